"""Tables as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest

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


LINE = 80
"""Characters of a line, where nothing tells how wide a reader's are."""
_NARROWEST = 14  # a column of text is not broken into narrower lines


def text_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    left: int | None = None,
    rule: bool = False,
    width: int | None = None,
) -> str:
    """A table in columns as wide as their widest cell, one line a row beneath the headings.

    Args:
        columns: the headings.
        rows: the cells; see :func:`cell_text`.
        left: how many columns, from the first, are set to the left, the others to the right; default: columns of
            numbers to the right, all others to the left.
        rule: dashes beneath the headings.
        width: characters of a line; default: as many as it takes. Where a table is wider, its texts are broken into
            lines, and columns that still do not fit stand beneath, in tables that have the first column again.
    """
    texts = [list(columns), *([cell_text(cell) for cell in row] for row in rows)]
    right = [is_numeric(rows, i) if left is None else i >= left for i in range(len(columns))]
    widths, blocks = _fitted(texts, right, width)
    return "\n\n".join(_lines(texts, block, widths, right, rule) for block in blocks)


def blocks_of(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], width: int, gap: int = 2
) -> list[list[int]]:
    """The columns of a table in groups that fit lines of some width, each with the first column in front.

    Args:
        columns, rows: as for :func:`text_table`.
        width: characters of a line.
        gap: those between two columns.
    """
    texts = [list(columns), *([cell_text(cell) for cell in row] for row in rows)]
    return _fitted(texts, [is_numeric(rows, i) for i in range(len(columns))], width, gap)[1]


def _fitted(
    texts: Sequence[Sequence[str]], right: Sequence[bool], width: int | None, gap: int = 2
) -> tuple[list[int], list[list[int]]]:
    """The width of each column, and the columns of each table that it takes."""
    places = list(range(len(right)))
    widths = [max(len(line[i]) for line in texts) for i in places]
    if width is None:
        return widths, [places]
    fits = sum(w if r else min(w, _NARROWEST) for w, r in zip(widths, right, strict=True))
    if (
        fits + gap * (len(widths) - 1) > width
    ):  # texts are broken for what stands in one table alone
        half = max(width // 2, _NARROWEST)
        widths = [w if r else min(w, half) for w, r in zip(widths, right, strict=True)]
    else:
        while (over := sum(widths) + gap * (len(widths) - 1) - width) > 0:
            broken = [i for i in places if not right[i] and widths[i] > _NARROWEST]
            widest = max(broken, key=lambda i: widths[i])
            second = max((widths[i] for i in broken if i != widest), default=_NARROWEST)
            widths[widest] = min(max(_NARROWEST, widths[widest] - over, second), widths[widest] - 1)
    blocks = [places[:1]]
    for i in places[1:]:
        block = [*blocks[-1], i]
        if len(block) > 2 and sum(widths[j] + gap for j in block) - gap > width:
            block = [places[0], i]
            blocks.append(block)
        blocks[-1] = block
    return widths, blocks


def _lines(
    texts: Sequence[Sequence[str]],
    block: Sequence[int],
    widths: Sequence[int],
    right: Sequence[bool],
    rule: bool,
) -> str:
    lines = []
    for number, line in enumerate(texts):
        cells = [_broken(line[i], widths[i]) for i in block]
        for parts in zip_longest(*cells, fillvalue=""):
            lines.append(
                "  ".join(
                    part.rjust(widths[i]) if right[i] else part.ljust(widths[i])
                    for part, i in zip(parts, block, strict=True)
                ).rstrip()
            )
        if rule and not number:
            lines.append("  ".join("-" * widths[i] for i in block))
    return "\n".join(lines)


def _broken(text: str, width: int) -> list[str]:
    """A text in lines of some width: between words, or within one that is too long."""
    return textwrap.wrap(text, width, break_on_hyphens=False) if len(text) > width else [text]
