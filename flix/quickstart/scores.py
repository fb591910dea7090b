"""Summarises the metrics of runs over seeds, by method: seen, low-resource and zero-shot cells. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .data import Cell, QuickstartData, copy_baseline

#: Column -> which cells it averages. The tuning half of the zero-shot cells guided choices; the test half did not.
COLUMNS: dict[str, Callable[[Cell], bool]] = {
    "seen": lambda cell: cell.held_out is None,
    "low-resource": lambda cell: cell.held_out is None and cell.low_resource,
    "zero-shot": lambda cell: cell.held_out == "test",
    "zero-shot, tuning": lambda cell: cell.held_out == "tuning",
}
#: Key in the results -> name of the score in ``metrics.json``.
METRICS = {"exact": "exact_match", "chrf": "chrf"}
By = Mapping[str, Mapping[str, float]]


def name_of(cell: Mapping[str, Any]) -> str:
    """``language/task`` of a cell in ``metrics.json``."""
    return "/".join(cell["features"][group][0] for group in ("language", "task"))


def by_cell(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Cell -> scores, from what a run's ``metrics.json`` holds."""
    return {
        name_of(cell): {key: cell["scores"][score] for key, score in METRICS.items()}
        for cell in metrics["cells"]
    }


def average(data: QuickstartData, cells: By, column: str, metric: str) -> float:
    """The mean over the column's cells; every one of them has the same weight, large or small."""
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


def copies(data: QuickstartData) -> dict[str, float]:
    """Exact match of answering the test rows with the input, by column."""
    rates = {column: [copy_baseline(c.test) for c in data.cells if holds(c)] for column, holds in COLUMNS.items()}  # fmt: skip
    return {column: round(statistics.fmean(found), 2) for column, found in rates.items()}


def score_rows(results: Mapping[str, Any], metric: str) -> list[list[str]]:
    """The table of one metric as text, with a row for each method and a column for each kind of cells."""
    rows = []
    for arm in results["arms"].values():
        row = [arm["title"]]
        for column in COLUMNS:
            value = arm["scores"][column][metric]
            spread = f" ±{value['sd']:.1f}" if value["sd"] is not None else ""
            row.append(f"{value['mean']:.1f}{spread}")
        rows.append(row)
    if metric == "exact":
        rows.append(["copying the input", *(f"{results['copy'][c]:.1f}" for c in COLUMNS)])
    return rows
