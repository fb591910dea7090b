"""A run that starts from an adapter instead of from nothing (``start_from`` in ``docs/cli.md``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flix import hub
from flix.core.adapter.adapter import Adapter
from flix.core.adapter.base import differing
from flix.core.adapter.files import load_adapter, stored_adapter
from flix.core.adapter.starting import grown, started
from flix.core.config.config import FlixConfig
from flix.core.errors import AdapterError, ConfigError, listed
from flix.core.features.names import Feature
from flix.tasks.recipe import read_recipe
from flix.transformers.folders import ADAPTER

if TYPE_CHECKING:
    from flix.tasks.task import Task


def start_folder(name: str | None, base_folder: Path) -> Path | None:
    """The folder of an adapter to start from; None if there is none.

    Args:
        name: a run's folder, an adapter's folder, or an adapter's name on a hub.
        base_folder: what a relative folder is relative to.

    Raises:
        AdapterError: there is no such folder, or the hub cannot provide it.
    """
    if name is None:
        return None
    place = base_folder / os.path.expanduser(name)
    if (place / ADAPTER).is_dir():
        return place / ADAPTER
    if place.is_dir():
        return place
    if hub.is_name(name):
        return hub.fetch(name)
    raise AdapterError(f"start_from: there is no folder {str(place)!r}")


def grown_from(asked: FlixConfig, name: str | None, base_folder: Path) -> FlixConfig:
    """The configuration that is asked for, or, with an adapter to start from, that adapter's with what is new.

    Raises:
        AdapterError: as for :func:`start_folder`.
        ConfigError: as for :func:`flix.core.adapter.starting.grown`.
    """
    if (folder := start_folder(name, base_folder)) is None:
        return asked
    with stored_adapter(folder) as stored:
        return grown(stored.config, asked)


def features_before(name: str | None, base_folder: Path) -> tuple[Feature, ...]:
    """The features of the adapter to start from; none if there is none."""
    if (folder := start_folder(name, base_folder)) is None:
        return ()
    with stored_adapter(folder) as stored:
        return tuple(stored.config.registry.live)


def start(
    model: Any, folder: Path, tasks: Sequence[Task], output: Path, *, freeze: bool = False
) -> Any:
    """Give a fresh model the values of an earlier adapter; its other features stay as they begin.

    Args:
        model: an adapted model, whose configuration is :func:`flix.core.adapter.starting.grown`.
        folder: the earlier adapter's.
        tasks: the model's tasks.
        output: the folder of the new run.
        freeze: whether what the earlier adapter has stays as it is, heads included.

    Returns:
        The model.

    Raises:
        AdapterError: the earlier adapter was trained on another base or in other layers, or has the heads of a task
            that the model lacks.
        ConfigError: nothing would be left to train, or the earlier adapter is in the new run's folder.
    """
    from flix.backends.torch import verbs

    if folder.resolve().is_relative_to(output.resolve()):
        raise ConfigError(
            f"start_from: {str(folder)!r} is in the folder that the new run writes, output: {str(output)!r}; give the new run "
            "another output:"
        )
    adapter = load_adapter(folder)
    try:
        verbs.check_fits(adapter, model)
    except AdapterError as error:
        raise AdapterError(f"start_from: {error}") from None
    if said := differing(adapter.base, verbs.base_of(model, adapter.layers)):
        raise AdapterError(f"start_from: {said}")
    _check_heads(model, adapter, folder, tasks)
    model = verbs.load_into(model, started(verbs.adapter_of(model), adapter))
    if freeze:
        parameters = dict(model.named_parameters())
        for name in adapter.heads:
            parameters[name].requires_grad_(False)
        model = verbs.freeze(model, adapter.config.registry.live)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                "freeze_start: the data names no feature that the adapter to start from lacks, so nothing would train; "
                "leave freeze_start out"
            )
    return model


def _check_heads(model: Any, adapter: Adapter, folder: Path, tasks: Sequence[Task]) -> None:
    places = dict(model.named_parameters())
    lost = [name for name in adapter.heads if name not in places]
    if not lost:
        return
    known = [task["name"] for task in (read_recipe(folder) or {"tasks": []})["tasks"]]
    names = [name for name in known if name not in {task.name for task in tasks}] or lost
    raise AdapterError(
        f"start_from: the adapter has heads of {listed(names, 5)}, which no data set here is of; keep a data set of each "
        "of its tasks, so that their heads are kept"
    )
