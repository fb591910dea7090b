"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Sequence

Cell = str | int | float | None


def cell_text(value: Cell) -> str:
    """A cell as people read it: thousands with commas, yes and no, "-" for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if 0 < abs(value) < 0.1 else f"{value:,.2f}"
    return value


def is_numeric(rows: Sequence[Sequence[Cell]], column: int) -> bool:
    """Whether a column's cells are all numbers or nothing."""
    cells = (row[column] for row in rows)
    return all(
        cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool))
        for cell in cells
    )


def text_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    left: int | None = None,
    rule: bool = False,
) -> str:
    """A table in columns as wide as their widest cell, one line a row beneath the headings.

    Args:
        columns: the headings.
        rows: the cells; see :func:`cell_text`.
        left: how many columns, from the first, are set to the left, the others to the right; default: columns of
            numbers to the right, all others to the left.
        rule: dashes beneath the headings.
    """
    texts = [list(columns), *([cell_text(cell) for cell in row] for row in rows)]
    places = range(len(columns))
    right = [is_numeric(rows, i) if left is None else i >= left for i in places]
    widths = [max(len(line[i]) for line in texts) for i in places]
    if rule:
        texts.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            line[i].rjust(widths[i]) if right[i] else line[i].ljust(widths[i]) for i in places
        ).rstrip()
        for line in texts
    )
