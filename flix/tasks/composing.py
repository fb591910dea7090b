"""Other combinations of features in cells that were never trained, as ``flix evaluate --compose`` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flix.core.errors import SettingsError, near
from flix.core.features.registry import FeatureRegistry
from flix.tasks.evaluation import Evaluator

_EXAMPLES = 32  # rows of a cell that a search may see


@dataclass(frozen=True)
class Composed:
    """What ``--compose`` asks for.

    Attributes:
        factors: for groups of features; 0 leaves them out.
        parents: by group, the feature that takes the place of every row's own.
        searched: groups whose weights are searched.
    """

    factors: Mapping[str, float]
    parents: Mapping[str, str]
    searched: tuple[str, ...]


def parse(texts: Sequence[str], registry: FeatureRegistry) -> Composed:
    """Read ``language=off``, ``language=0.5``, ``language=parent:zul`` and ``language=searched``.

    Raises:
        SettingsError: another form, an unknown group or feature, or a group twice.
    """
    factors: dict[str, float] = {}
    parents: dict[str, str] = {}
    searched: list[str] = []
    for text in (part for given in texts for part in given.split(",")):
        group, _, how = text.strip().partition("=")
        if group not in registry.groups:
            raise SettingsError(
                f"--compose: there is no group {group!r}{near(group, registry.groups)}; the groups are: "
                f"{', '.join(registry.groups)}"
            )
        if group in factors or group in parents or group in searched:
            raise SettingsError(f"--compose: the group {group!r} is given twice")
        if how == "searched":
            searched.append(group)
        elif how.startswith("parent:"):
            parents[group] = _parent(how.removeprefix("parent:"), group, registry)
        else:
            factors[group] = _factor(how, group)
    return Composed(factors, parents, tuple(searched))


def _parent(name: str, group: str, registry: FeatureRegistry) -> str:
    names = registry.names(group)
    if name not in names:
        raise SettingsError(f"--compose: the group {group!r} has no {name!r}{near(name, names)}")
    return name


def _factor(how: str, group: str) -> float:
    try:
        found = 0.0 if how == "off" else float(how)
        if np.isfinite(np.float32(found)):
            return found
    except (ValueError, OverflowError):
        pass
    raise SettingsError(
        f"--compose: {group}= must be off, a factor such as 0.5, parent:NAME or searched; got "
        f"{how!r}"
    )


def apply(asked: Composed, evaluator: Evaluator, model: Any) -> dict[str, Any]:
    """Change what an evaluator's rows of cells that were never trained activate.

    Weights are searched on the first rows of a cell, at most half of them, which are then no longer evaluated.

    Returns:
        What each cell's rows activate now, where weights were searched.
    """
    for group in (*asked.parents, *asked.searched):
        if group not in evaluator.collator.columns:
            raise SettingsError(
                f"--compose: no row names the group {group!r}, which others imply; it can only "
                f"be off or a factor"
            )
    if asked.factors or asked.parents or asked.searched:
        # In place of the configuration's factors: with one of 0, a parent or found weights would count for nothing.
        evaluator.elsewhere = evaluator.collator.evaluation(asked.factors)
        evaluator.stated[:] = False
    for place in np.flatnonzero(~evaluator.of_seen).tolist():
        evaluator.rows[place] = {**evaluator.rows[place], **asked.parents}
    return _search(asked.searched, evaluator, model) if asked.searched else {}


def _search(groups: Sequence[str], evaluator: Evaluator, model: Any) -> dict[str, Any]:
    from flix.backends.torch import search_weights
    from flix.tasks.collating import on_device

    keep = np.ones(len(evaluator), bool)
    found: dict[str, Any] = {}
    inner = evaluator.collator.evaluation().collator
    for cell in np.unique(evaluator.cells[~evaluator.of_seen]).tolist():
        places = np.flatnonzero(evaluator.cells == cell)
        given = places[: min(_EXAMPLES, len(places) // 2)].tolist()
        if not given:
            continue
        keep[given] = False
        rows = [evaluator.rows[i] for i in given]
        row = {group: rows[0].get(group) for group in evaluator.collator.columns}
        batch = on_device(inner(rows), next(model.parameters()).device)
        weights = search_weights(model, batch, row, groups=list(groups), unknown=evaluator.collator.unknown).row  # fmt: skip
        for place in places.tolist():
            evaluator.rows[place] = {**evaluator.rows[place], **{g: weights.get(g) for g in row}}
        found[evaluator.names[cell]] = weights
    evaluator.keep(keep)
    return found
