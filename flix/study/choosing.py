"""Finds each arm's best choice and best factors for held-out cells, from its runs on the choosing cells. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flix.core.features.cells import HeldOut
from flix.core.features.registry import FeatureRegistry
from flix.study.working import SEARCHED

SEEN, CHOOSING, LAST_WORD, UNSEEN = "seen", "choosing", "last_word", "unseen"


def group_of(
    cell: Mapping[str, Any], choosing: HeldOut, last_word: HeldOut, registry: FeatureRegistry | None
) -> str:
    """What a cell is for: training, choosing, or the last word.

    Args:
        cell: as ``metrics.json`` has it.
        choosing, last_word: the cells that are held out for each.
        registry: the registry, if it has every feature of every cell.

    Returns:
        ``"seen"``, ``"choosing"``, ``"last_word"``, or ``"unseen"`` for a cell without training rows that is not held
        out for either.
    """
    if cell.get("seen"):
        return SEEN
    if choosing.covers(cell["features"], registry):
        return CHOOSING
    return LAST_WORD if last_word.covers(cell["features"], registry) else UNSEEN


def means(cells: Iterable[Mapping[str, Any]], group: Callable[[Mapping[str, Any]], str]) -> dict[str, float | None]:  # fmt: skip
    """The mean scores of the seen cells and of those for choosing, with equal weight for each cell, and their mean."""
    found: dict[str, list[float]] = {SEEN: [], CHOOSING: []}
    for cell in cells:
        score = cell["score"]
        if score is not None and not math.isnan(score) and group(cell) in found:
            found[group(cell)].append(score)
    each = {name: _mean(scores) for name, scores in found.items()}
    both = [value for value in each.values() if value is not None]
    return {**each, "both": _mean(both) if len(both) == 2 else None}


def _mean(scores: Sequence[float]) -> float | None:
    return round(statistics.fmean(scores), 3) if scores else None


def best(table: Sequence[Mapping[str, Any]], by: str) -> int | None:
    """The index of the best entry, the first one if several are equal; None if no entry has a score."""
    scored = [(entry[by], -place) for place, entry in enumerate(table) if entry.get(by) is not None]
    return -max(scored)[1] if scored else None


def edges(choice: Mapping[str, str], grid: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings whose chosen number is the smallest or largest of the grid: a better one may lie outside."""
    found = []
    for key, name in choice.items():
        values = list(grid[key].values())
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if numbers and len(values) > 1 and grid[key][name] in (min(values), max(values)):
            found.append(key)
    return found


def best_weights(found: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best factors for groups, and a table with the mean score of the cells for each of them.

    Searched weights are in the table but are never chosen, because they have seen rows of the cell itself.
    """
    table = [
        {"weights": entry["weights"], CHOOSING: means(entry["cells"].values(), lambda cell: CHOOSING)[CHOOSING]}
        for entry in found
    ]  # fmt: skip
    fair = [entry for entry in table if SEARCHED not in entry["weights"].values()]
    place = best(fair, CHOOSING)
    return (dict(fair[place]["weights"]) if place is not None else {}), table
