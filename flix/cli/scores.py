"""The table of scores that ``train`` and ``evaluate`` end with."""

from __future__ import annotations

from typing import Any

from flix.cli.console import show_table


def show_scores(result: dict[str, Any]) -> None:
    """Results by cell, then the averages."""
    rows = [
        [c["cell"], "seen" if c["seen"] else "held out", c["rows"], c["exact_match"], c["chrf"]]
        for c in sorted(result["cells"], key=lambda c: not c["seen"])
    ]
    for name, key in (("average, seen", "seen"), ("average, held out", "held_out")):
        if (mean := result[key]) is not None:
            cells = f"{mean['cells']} cell{'s' if mean['cells'] != 1 else ''}"
            rows.append([name, cells, mean["rows"], mean["exact_match"], mean["chrf"]])
    show_table(["combination", "trained", "rows", "exact match %", "chrF"], rows)
