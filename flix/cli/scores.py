"""The tables of scores that ``train`` and ``evaluate`` end with."""

from __future__ import annotations

import math
from typing import Any

from flix.cli.console import show_table
from flix.core.tables import Cell

_GRID = 8  # columns of a grid; more make a list


def show_scores(result: dict[str, Any]) -> None:
    """A grid of languages and tasks, or whichever two groups cells differ in; then the averages."""
    cells = result["cells"]
    if (grid := _grid(cells)) is not None:
        show_table(*grid)
    else:
        rows: list[list[Cell]] = [
            [c["cell"], "" if c["seen"] else "held out", c["rows"], c["metric"], _number(c["score"]), _interval(c)]
            for c in sorted(cells, key=lambda c: not c["seen"])
        ]  # fmt: skip
        show_table(["combination", "trained", "rows", "metric", "score", "95 %"], rows)
    rows = []
    for name, key in (("seen", "seen"), ("held out", "held_out")):
        for kind, mean in ((result[key] or {}).get("by_kind") or {}).items():
            others = "  ".join(f"{k} {_number(v)}" for k, v in list(mean["scores"].items())[1:2])
            rows.append([f"average, {name}", kind.partition(",")[0], mean["cells"], mean["metric"], _number(mean["score"]), others])  # fmt: skip
    show_table(["", "kind", "cells", "metric", "score", "beside it"], rows)


def _grid(cells: list[dict[str, Any]]) -> tuple[list[str], list[list[Cell]], str] | None:
    """The scores as a table of two groups; None if other groups tell cells apart, or if it would be too wide."""
    told: dict[str, set[str]] = {}
    for cell in cells:
        for group, names in cell["features"].items():
            told.setdefault(group, set()).add("+".join(names))
    groups = [group for group, names in told.items() if len(names) > 1]
    if len(groups) != 2 or any({*groups} - {*cell["features"]} for cell in cells):
        return None
    across, down = sorted(groups, key=lambda g: (len(told[g]) > _GRID, g != "task", len(told[g])))
    columns = list(dict.fromkeys("+".join(c["features"][across]) for c in cells))
    if len(columns) > _GRID:
        return None
    scores = {(_of(c, down), _of(c, across)): f"{_number(c['score'], 1)}{'' if c['seen'] else '*'}" for c in cells}  # fmt: skip
    names = list(dict.fromkeys(_of(c, down) for c in cells))
    rows: list[list[Cell]] = [[n, *(scores.get((n, c), "") for c in columns)] for n in names]
    return [f"{down} \\ {across}", *columns], rows, "scores in percent; * never trained"


def _of(cell: dict[str, Any], group: str) -> str:
    return "+".join(cell["features"][group])


def _interval(cell: dict[str, Any]) -> str:
    low, high = cell["interval"]
    return "-" if math.isnan(low) else f"{low:g} to {high:g}"


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
