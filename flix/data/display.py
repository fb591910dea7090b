"""A mixture as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from flix.core.tables import Cell, text_table


def table_of(
    rows: Sequence[tuple[str, int, int, float, int]],
    held: Sequence[tuple[str, int]],
    *,
    temperature: float,
) -> str:
    """The table.

    Args:
        rows: of each trained cell its name, its rows, what it counts for, its probability, its rows in an epoch.
        held: of each held-out cell its name and its rows.
        temperature: of the mixture.
    """
    lines: list[list[Cell]] = [[name, n, m, f"{p:.4f}", k] for name, n, m, p, k in rows]
    lines += [[name, n, "", "", "held out"] for name, n in held]
    total = sum(k for *_, k in rows)
    text = text_table(["cell", "rows", "counted", "p", "an epoch"], lines, left=1)
    return f"{text}\n{len(rows)} cells, {total:,} rows an epoch, temperature {temperature:g}"
