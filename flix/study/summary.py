"""A study's scores in a table. Pure. Arms that are not whole have no figures in it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

COLUMNS = ["arm", "seen", "choosing", "last word", "ranks", "parameters", "seeds"]
_GROUPS = ("seen", "choosing", "last_word")


def average(cells: Mapping[str, Mapping[str, Any]], group: str) -> float | None:
    """The mean score of a run's cells of a group, each counting alike; None without any.

    Args:
        cells: as ``scores.json`` has them.
        group: ``"seen"``, ``"choosing"`` or ``"last_word"``.
    """
    found = [c["score"] for c in cells.values() if c["group"] == group and c["score"] is not None and not math.isnan(c["score"])]  # fmt: skip
    return statistics.fmean(found) if found else None


def rows(scores: Mapping[str, Any]) -> list[list[Any]]:
    """A row an arm: means over seeds, with their standard deviation, or that it is not whole."""
    missing = [name.rpartition(", seed ")[0] for name in scores["missing"]]
    found = []
    for name, arm in scores["arms"].items():
        seeds, absent = arm["seeds"].values(), missing.count(name)
        figures = ["not whole"] * len(_GROUPS) if absent else [_spread([average(s["cells"], group) for s in seeds]) for group in _GROUPS]  # fmt: skip
        said = f"{len(seeds)} of {len(seeds) + absent}" if absent else str(len(seeds))
        ranks = f"{arm['active_rank']} of {arm['total_rank']}"
        found.append([arm["title"], *figures, ranks, arm["trainable"], said])
    return found


def _spread(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    text = f"{statistics.fmean(there):.1f}"
    return f"{text} ±{statistics.stdev(there):.1f}" if len(there) > 1 else text
