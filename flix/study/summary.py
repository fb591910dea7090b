"""A study's scores as rows of a table. Pure. Arms with a missing run have no figures in it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from typing import Any

COLUMNS = ["arm", "seen", "choosing", "last word", "seeds"]
RANK_COLUMNS = ["method", "ranks", "active", "total", "parameters", "training"]
_GROUPS = ("seen", "choosing", "last_word")


def average(
    cells: Mapping[str, Mapping[str, Any]], group: str, among: Collection[str] | None = None
) -> float | None:
    """The mean score of a run's cells in a group, each with the same weight; None if there are none.

    Args:
        cells: as ``scores.json`` has them.
        group: ``"seen"``, ``"choosing"`` or ``"last_word"``.
        among: the cells to count; default: all.
    """
    scores = [
        cell["score"]
        for name, cell in cells.items()
        if cell["group"] == group and (among is None or name in among)
    ]
    found = [score for score in scores if score is not None and not math.isnan(score)]
    return statistics.fmean(found) if found else None


def rows(scores: Mapping[str, Any]) -> list[list[Any]]:
    """One row for each arm: means over seeds with their standard deviation, or "unfinished".

    Only cells that every arm evaluated count. Otherwise the mean of an arm that lacks a task would be over other cells.
    """
    missing = [name.rpartition(", seed ")[0] for name in scores["missing"]]
    runs = [run["cells"].keys() for arm in scores["arms"].values() for run in arm["seeds"].values()]
    shared = set.intersection(*map(set, runs)) if runs else set()
    found = []
    for name, arm in scores["arms"].items():
        seeds, absent = arm["seeds"].values(), missing.count(name)
        figures = ["unfinished"] * len(_GROUPS)
        if not absent:
            each = ([average(run["cells"], group, shared) for run in seeds] for group in _GROUPS)
            figures = [_spread(values) for values in each]
        said = f"{len(seeds)} of {len(seeds) + absent}" if absent else str(len(seeds))
        found.append([arm["title"], *figures, said])
    return found


def rank_rows(arms: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Ranks, parameters and training time of each arm, as text.

    Args:
        arms: each with ``title``, ``ranks``, ``active_rank``, ``total_rank``, ``trainable``, and either the ``seconds``
            of its training or ``seeds`` that have them.
    """
    return [
        [
            arm["title"],
            ", ".join(f"{group} {_ranks(rank)}" for group, rank in arm["ranks"].items() if rank),
            str(arm["active_rank"]),
            str(arm["total_rank"]),
            f"{arm['trainable']:,}",
            f"{_seconds(arm):.0f} s",
        ]
        for arm in arms
    ]


def _ranks(rank: Any) -> str:
    if not isinstance(rank, Mapping):
        return str(rank)
    return f"{min(rank.values())} to {max(rank.values())}"


def _seconds(arm: Mapping[str, Any]) -> float:
    return arm["seconds"] if "seconds" in arm else statistics.fmean(s["seconds"] for s in arm["seeds"].values())  # fmt: skip


def _spread(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    text = f"{statistics.fmean(there):.1f}"
    return f"{text} ±{statistics.stdev(there):.1f}" if len(there) > 1 else text
