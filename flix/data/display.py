"""A mixture as a table for people."""

from __future__ import annotations

from collections.abc import Sequence


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
    lines = [("cell", "rows", "counted", "p", "an epoch")]
    lines += [(name, f"{n:,}", f"{m:,}", f"{p:.4f}", f"{k:,}") for name, n, m, p, k in rows]
    lines += [(name, f"{n:,}", "", "", "held out") for name, n in held]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    text = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    ]
    total = sum(k for *_, k in rows)
    text.append(f"{len(rows)} cells, {total:,} rows an epoch, temperature {temperature:g}")
    return "\n".join(line.rstrip() for line in text)
