"""What a run leaves in its folder: the formats are written in ``docs/cli.md``, and ``flix report`` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flix.core.features.names import written
from flix.core.machine import command, machine, versions
from flix.tasks import locate
from flix.tasks.recipe import RECIPE, joined, recipe_of
from flix.tasks.starting import start_folder
from flix.training.data import Data
from flix.training.models import Built
from flix.training.settings import Settings
from flix.transformers.folders import ADAPTER, FORMAT, processes, write_json

# What may differ between the start of a run and its continuation.
_TRAINING = (
    "best",
    "device",
    "eval_every",
    "keep_checkpoints",
    "log_every",
    "patience",
    "report_to",
    "save_every",
    "steps",
    "threads",
)
FREE = frozenset({"output", "evaluation", *(f"training.{key}" for key in _TRAINING)})


def goes_by(settings: Settings, data: Data) -> dict[str, Any]:
    """What a run goes by: its settings, its data and how many processes share its rows."""
    trained = [file for part in data.files if not part["evaluation"] for file in part["files"]]
    files = [{**file, "name": _name(file["name"], settings.base_folder)} for file in trained]
    return {"format": FORMAT, "settings": settings.to_dict(), "data": files, "processes": processes()}  # fmt: skip


def _name(name: str, folder: Path) -> str:
    """A file's name beside the configuration, which may move together with its data."""
    inside = Path(name).is_relative_to(folder)
    return Path(name).relative_to(folder).as_posix() if inside else name


def read_again(before: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier flix with what it did not have yet at its default; ValueError for those of a later one."""
    return Settings.model_validate(before).to_dict()


def write_recipe(output: Path, settings: Settings, data: Data, built: Built) -> None:
    """``adapter/recipe.json``."""
    e, own = settings.evaluation, settings.tokenizer
    recipe = recipe_of(
        locate(settings.model, settings.base_folder),
        locate(own, settings.base_folder) if own else None,
        built.tasks,
        data.specs,
        data.mixture.cells,
        dtype=settings.training.dtype,
        unseen_group_weights=e.unseen_group_weights,
        max_new_tokens=e.max_new_tokens,
        num_beams=e.num_beams,
    )
    start = start_folder(settings.start_from, settings.base_folder)
    write_json(output / ADAPTER / RECIPE, joined(recipe, start) if start else recipe)


def run_json(settings: Settings, data: Data, built: Built, cost: Mapping[str, Any], **more: Any) -> dict[str, Any]:  # fmt: skip
    """``run.json``: what it takes to repeat the run, and what it cost.

    Args:
        settings: the configuration.
        data: the data.
        built: the model.
        cost: seconds a step, tokens, memory.
        more: when it started, how long it took, its steps.
    """
    from flix.backends.torch import summary

    counts = summary(built.model)
    bank = built.model.flix_bank
    by_feature = {written(bank.features[i]): p.numel() for i, p in bank.held().items()}
    return {
        "command": command(),
        **more,
        "seed": settings.seed,
        "versions": versions("torch", "transformers", "accelerate", "datasets", "numpy"),
        "machine": machine(str(next(built.model.parameters()).device)),
        "data": data.files,
        "parameters": {
            "base": counts.total - counts.trainable,
            "trainable": counts.trainable,
            "by_feature": by_feature,
        },
        "cost": dict(cost),
    }
