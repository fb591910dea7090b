"""Cells laid out in two groups: scores, differences of two runs, rows of the mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log
from typing import Generic, Protocol, TypeVar

from flix.core.errors import listed, near
from flix.core.features.cells import Cell
from flix.report.reading import ReportError
from flix.report.records import Drawn, Scored
from flix.report.runs import Run

ALL = "all"
"""The name of a row or column where a cell names no feature of the group, or there is one group alone."""


class Celled(Protocol):
    """Anything that has a cell."""

    @property
    def features(self) -> Cell: ...


_Entry = TypeVar("_Entry", bound=Celled)


@dataclass(frozen=True)
class Axes:
    """The groups that rows and columns stand for; no columns where the cells name one group alone."""

    rows: str
    columns: str | None

    def place(self, cell: Cell) -> tuple[str, str]:
        """The row and the column of a cell."""
        names = {group: "+".join(found) for group, found in cell}
        return names.get(self.rows, ALL), ALL if self.columns is None else names.get(
            self.columns, ALL
        )


def choose_axes(runs: Sequence[Run], rows: str | None, columns: str | None) -> Axes | None:
    """The two groups of a report's grids.

    Args:
        runs: the runs.
        rows: the group of rows; default: of the two groups that most cells name, the one with more features, unless
            each column has one metric the other way round alone.
        columns: the group of columns; default: the other one.

    Returns:
        None where no run has a cell.

    Raises:
        ReportError: no cell names a group that was asked for, or both are the same.
    """
    cells: dict[Cell, None] = {}
    for run in runs:
        cells.update((c.features, None) for c in (run.metrics.cells if run.metrics else ()))
        cells.update((c.features, None) for c in (run.mixture.cells if run.mixture else ()))
    names: dict[str, set[tuple[str, ...]]] = {}
    counts: dict[str, int] = {}
    for cell in cells:
        for group, found in cell:
            names.setdefault(group, set()).add(found)
            counts[group] = counts.get(group, 0) + 1
    for option, asked in (("--rows", rows), ("--columns", columns)):
        if asked is not None and asked not in counts:
            raise ReportError(
                f"{option}: no cell names the group {asked!r}{near(asked, counts)}; the groups are: "
                f"{listed(counts)}"
            )
    if rows is not None and rows == columns:
        raise ReportError(f"--rows and --columns must be two groups, got {rows!r} twice")
    best = sorted(counts, key=lambda g: (-counts[g], -len(names[g])))
    best = [group for group in best if group not in (rows, columns)]
    if rows is None and columns is None:
        best[:2] = sorted(best[:2], key=lambda g: (-len(names[g]), g != "language"))
        if len(best) > 1 and _mixed(runs, best[1]) and not _mixed(runs, best[0]):
            best[:2] = best[1::-1]
    if rows is None and not best:  # no group, or one alone that was asked for as the columns
        return Axes(columns, None) if columns is not None else None
    rows = rows if rows is not None else best.pop(0)
    return Axes(rows, columns if columns is not None or not best else best[0])


def _mixed(runs: Sequence[Run], group: str) -> bool:
    """Whether some feature of a group has cells of several metrics."""
    metrics: dict[tuple[str, ...], set[str]] = {}
    for cell in (c for run in runs if run.metrics for c in run.metrics.cells):
        names = dict(cell.features).get(group, ())
        metrics.setdefault(names, set()).add(cell.metric)
    return any(len(found) > 1 for found in metrics.values())


@dataclass(frozen=True)
class Square:
    """A square of a grid.

    Attributes:
        text: what stands in it.
        heat: its colour, from -100 (the lowest of all, warm) over 0 (none) to 100 (the highest); None: it has none.
        column_heat: the same among the squares of its column.
        held_out: whether its cell is never trained on.
        strong: whether its text is set in bold.
        title: what it says in a sentence.
    """

    text: str
    heat: int | None
    column_heat: int | None = None
    held_out: bool = False
    strong: bool = False
    title: str = ""


@dataclass(frozen=True)
class Grid:
    """Squares by row and column; None where there is no cell."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    squares: tuple[tuple[Square | None, ...], ...]
    row_means: tuple[str, ...] = ()
    column_means: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0


class Places(Generic[_Entry]):
    """Entries by row and column, in the order of names."""

    def __init__(self, axes: Axes, entries: Iterable[_Entry]) -> None:
        self.found: dict[tuple[str, str], list[_Entry]] = {}
        for entry in entries:
            self.found.setdefault(axes.place(entry.features), []).append(entry)
        self.rows = tuple(sorted({row for row, _ in self.found}))
        self.columns = tuple(sorted({column for _, column in self.found}))

    def column(self, name: str) -> list[_Entry]:
        """A column's entries."""
        return [e for (_, column), some in self.found.items() if column == name for e in some]

    def laid(self, make: Callable[[list[_Entry]], Square]) -> tuple[tuple[Square | None, ...], ...]:
        """A square of each place that has entries."""
        return tuple(
            tuple(
                make(self.found[row, column]) if (row, column) in self.found else None
                for column in self.columns
            )
            for row in self.rows
        )


def score_grid(axes: Axes, cells: Sequence[Scored]) -> Grid:
    """Scores; a place with several cells (of a third group) shows their mean."""
    places = Places(axes, cells)
    values = {place: _mean(some) for place, some in places.found.items()}
    known = [v for v in values.values() if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    ends = {}
    for name in places.columns:
        column = [v for (_, c), v in values.items() if c == name and v is not None]
        ends[name] = (min(column), max(column)) if column else (0.0, 0.0)

    def make(some: list[Scored]) -> Square:
        value, (_, column) = _mean(some), axes.place(some[0].features)
        return Square(
            text=decimal(value),
            heat=_heat(value, low, high),
            column_heat=_heat(value, *ends[column]),
            held_out=all(not c.seen for c in some),
            title="; ".join(described(c) for c in some),
        )

    return Grid(
        places.rows,
        places.columns,
        tuple(_metrics(places.column(name)) for name in places.columns),
        places.laid(make),
        _means(values, 0, places.rows),
        _means(values, 1, places.columns),
        low,
        high,
    )


def difference_grid(axes: Axes, first: Sequence[Scored], other: Sequence[Scored]) -> Grid:
    """The first run's scores less the other's, over the cells that both have."""
    theirs = {cell.name: cell for cell in other}
    both = [c for c in first if c.name in theirs]
    places = Places(axes, both)
    values: dict[tuple[str, str], float | None] = {}
    for place, some in places.found.items():
        gaps = [
            c.score - their
            for c in some
            if c.score is not None and (their := theirs[c.name].score) is not None
        ]
        values[place] = sum(gaps) / len(gaps) if gaps else None
    most = max((abs(v) for v in values.values() if v is not None), default=0.0)

    def make(some: list[Scored]) -> Square:
        value = values[axes.place(some[0].features)]
        apart = [_apart(c, theirs[c.name]) for c in some]
        title = "; ".join(
            f"{c.name}: {decimal(c.score)} against {decimal(theirs[c.name].score)} {metric_name(c.metric)}"
            + (", intervals apart" if far else "")
            for c, far in zip(some, apart, strict=True)
        )
        return Square(
            text=decimal(value, signed=True),
            heat=None if value is None else round(100 * value / (most or 1.0)),
            held_out=all(not c.seen for c in some),
            strong=all(apart),
            title=title,
        )

    return Grid(
        places.rows,
        places.columns,
        tuple(_metrics(places.column(name)) for name in places.columns),
        places.laid(make),
        _means(values, 0, places.rows, True),
        _means(values, 1, places.columns, True),
        -most,
        most,
    )


def row_grid(axes: Axes, cells: Sequence[Drawn]) -> Grid:
    """Rows of the mixture's cells, warm by their logarithm; held-out cells are marked."""
    places = Places(axes, cells)
    most = max((sum(c.rows for c in some) for some in places.found.values()), default=0)

    def make(some: list[Drawn]) -> Square:
        rows = sum(c.rows for c in some)
        title = "; ".join(
            f"{c.name}: "
            + ("held out" if c.held_out else f"{c.rows:,} rows, drawn {c.drawn:,} times with p = {c.probability:.4f}")
            + f", {c.evaluation_rows:,} rows for evaluation"
            for c in some
        )  # fmt: skip
        return Square(
            text=f"{rows:,}",
            heat=round(100 * log(1 + rows) / log(1 + most)) if most else None,
            held_out=all(c.held_out for c in some),
            title=title,
        )

    return Grid(places.rows, places.columns, (), places.laid(make), low=0.0, high=float(most))


def decimal(value: float | None, signed: bool = False) -> str:
    """A score with one decimal; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:{'+' if signed else ''}.1f}"
    return "0.0" if text.strip("+-") == "0.0" else text.replace("-", "−")


_SPELT = {"chrf": "chrF", "entity_f1": "entity F1", "macro_f1": "macro-F1", "rmse": "RMSE"}


def metric_name(metric: str) -> str:
    """A metric as people write it."""
    return _SPELT.get(metric, metric.replace("_", " "))


def described(cell: Scored) -> str:
    """A cell's score in words."""
    text = f"{cell.name}: {decimal(cell.score)} {metric_name(cell.metric)}"
    if cell.interval is not None:
        text += f" (95 %: {decimal(cell.interval[0])} to {decimal(cell.interval[1])})"
    return f"{text}, {cell.rows:,} rows" + ("" if cell.seen else ", held out of training")


def _apart(one: Scored, other: Scored) -> bool:
    """Whether two scores' intervals do not touch."""
    if one.interval is None or other.interval is None:
        return False
    return one.interval[0] > other.interval[1] or other.interval[0] > one.interval[1]


def _mean(cells: Sequence[Scored]) -> float | None:
    known = [c.score for c in cells if c.score is not None]
    return sum(known) / len(known) if known else None


def _means(
    values: dict[tuple[str, str], float | None],
    axis: int,
    names: Sequence[str],
    signed: bool = False,
) -> tuple[str, ...]:
    """The mean of each row (axis 0) or column (axis 1)."""
    found = []
    for name in names:
        known = [v for place, v in values.items() if v is not None and place[axis] == name]
        found.append(decimal(sum(known) / len(known) if known else None, signed))
    return tuple(found)


def _heat(value: float | None, low: float, high: float) -> int | None:
    if value is None:
        return None
    return round(200 * (value - low) / (high - low)) - 100 if high > low else 0


def _metrics(cells: Sequence[Scored]) -> str:
    return " or ".join(sorted({metric_name(c.metric) for c in cells}))
