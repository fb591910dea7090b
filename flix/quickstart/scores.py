"""From scores by cell to the picture: seen, low-resource and zero-shot, by method, over seeds. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .data import Cell, QuickstartData

#: Column -> which cells it averages. The tuning half of the zero-shot cells guided choices; the test half did not.
COLUMNS: dict[str, Callable[[Cell], bool]] = {
    "seen": lambda cell: cell.held_out is None,
    "low-resource": lambda cell: cell.held_out is None and cell.low_resource,
    "zero-shot": lambda cell: cell.held_out == "test",
    "zero-shot, tuning": lambda cell: cell.held_out == "tuning",
}
METRICS = ("exact", "chrf")
By = Mapping[str, Mapping[str, float]]


def average(data: QuickstartData, cells: By, column: str, metric: str) -> float:
    """The mean over the column's cells: every (language, task) pair counts alike, large or small."""
    chosen = [cell.name for cell in data.cells if COLUMNS[column](cell) and cell.name in cells]
    return statistics.fmean(cells[name][metric] for name in chosen) if chosen else float("nan")


def summary(data: QuickstartData, runs: Iterable[By]) -> dict[str, dict[str, dict[str, Any]]]:
    """Column -> metric -> mean, standard deviation and values over the seeds of one method."""
    runs = list(runs)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for column in COLUMNS:
        table[column] = {}
        for metric in METRICS:
            values = [average(data, run, column, metric) for run in runs]
            table[column][metric] = {
                "mean": round(statistics.fmean(values), 2),
                "sd": round(statistics.stdev(values), 2) if len(values) > 1 else None,
                "values": [round(value, 2) for value in values],
            }
    return table


def copies(data: QuickstartData, split: str) -> dict[str, float]:
    """Exact match of answering with the input, by column."""
    from .data import copy_baseline

    result = {}
    for column, holds in COLUMNS.items():
        rates = [copy_baseline(getattr(c, split)) for c in data.cells if holds(c)]
        result[column] = round(statistics.fmean(rates), 2)
    return result


def differences(data: QuickstartData, ours: Iterable[By], theirs: Iterable[By]) -> dict[str, float]:
    """Cell -> exact match of one method minus another's, averaged over seeds."""
    ours, theirs = list(ours), list(theirs)
    return {
        cell.name: statistics.fmean(run[cell.name]["exact"] for run in ours)
        - statistics.fmean(run[cell.name]["exact"] for run in theirs)
        for cell in data.cells
        if all(cell.name in run for run in (*ours, *theirs))
    }
