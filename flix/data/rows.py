"""The rows of an epoch as a map-style dataset, for any loader that reads by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from flix.core.checks import whole
from flix.core.features.cells import Cell, HeldOutError, MixtureError, cell_name, cell_of
from flix.core.sampling.schedule import Schedule
from flix.data.columns import Table
from flix.data.epoch import SharedEpoch

Row = dict[str, Any]


class TrainRows:
    """The training rows of the current epoch, in the mixture's order.

    A row is a dict of its source's columns, in the source's format or through its transform, and the feature columns.
    PyTorch's ``DataLoader``, Accelerate and the ``Trainer`` read it as it is; no loader needs to shuffle it.

    Args:
        tables: the sources.
        order: int64, the numbers of the trained rows (counted through the tables) by cell.
        schedule: what each epoch takes, in places of ``order``.
        trained: the cells that may be drawn.
        length: if given, the rows of a whole run of this length, whatever epochs they are of.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        order: NDArray[np.int64],
        schedule: Schedule,
        trained: frozenset[Cell],
        length: int | None = None,
    ) -> None:
        self._tables = tuple(tables)
        self._order = order
        self._schedule = schedule
        self._trained = trained
        self._length = length
        self._epoch = SharedEpoch()

    def __len__(self) -> int:
        return self._schedule.length if self._length is None else self._length

    def of_length(self, length: int) -> TrainRows:
        """The rows of a whole run of this length."""
        return TrainRows(self._tables, self._order, self._schedule, self._trained, length)

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self._epoch.value

    def set_epoch(self, epoch: int) -> None:
        """Make the rows those of another epoch.

        Raises:
            MixtureError: not a whole number of 0 or more.
        """
        self._epoch.value = whole(epoch, "an epoch", 0, MixtureError)

    def rows_of(self, epoch: int) -> NDArray[np.int64]:
        """The numbers of an epoch's rows, counted through the sources: int64 ``[length]``."""
        return self._order[self._schedule.rows(whole(epoch, "an epoch", 0, MixtureError))]

    @overload
    def __getitem__(self, position: int) -> Row: ...

    @overload
    def __getitem__(self, position: slice) -> list[Row]: ...

    def __getitem__(self, position: int | slice) -> Row | list[Row]:
        if isinstance(position, slice):
            return self.__getitems__(list(range(*position.indices(len(self)))))
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Row]:
        """Several rows at once.

        Raises:
            IndexError: a position that the epoch does not have.
            HeldOutError: a row of a cell that is not trained on would be returned; it is not.
        """
        length = len(self)
        where = np.asarray(positions, np.int64)
        for position in where[(where < -length) | (where >= length)].tolist():
            of = "an epoch" if self._length is None else "a run"
            raise IndexError(f"position {position} of {of} of {length} rows")
        first = 0 if self._length is not None else self.epoch * length
        numbers = self._order[self._schedule.draw(where % length + first)]
        return read_numbered(self._tables, numbers, self._guard)

    def __iter__(self) -> Iterator[Row]:
        # In blocks, since reading rows one by one costs more.
        for start in range(0, len(self), 64):
            yield from self[start : start + 64]

    def _guard(self, table: Table, row: int, features: dict[str, Any]) -> None:
        """A row's own features are checked, not the numbers that led to it."""
        cell = cell_of(features)
        if cell not in self._trained:
            raise HeldOutError(
                f"{table.source.label}, row {row} is of {cell_name(cell)}, which is not trained on; "
                "the mixture does not return it"
            )


def read_numbered(
    tables: Sequence[Table],
    numbers: NDArray[np.int64],
    guard: Callable[[Table, int, dict[str, Any]], None] | None = None,
) -> list[Row]:
    """Rows by their numbers, counted through the sources, with the feature columns.

    Args:
        tables: the sources.
        numbers: int64 ``[n]``.
        guard: called with each row's source, place in it and features; raises if it may not be given out.
    """
    starts = np.cumsum([0, *map(len, tables)])[:-1]
    owners = np.searchsorted(starts, numbers, side="right") - 1
    found: list[Row] = [{} for _ in range(len(numbers))]
    for owner in np.unique(owners).tolist():
        places = np.flatnonzero(owners == owner).tolist()
        table = tables[owner]
        local = (numbers[places] - starts[owner]).tolist()
        features = [table.features(row) for row in local]
        if guard is not None:
            for row, own in zip(local, features, strict=True):
                guard(table, row, own)
        read = table.source.dataset.__getitems__(local)
        for place, row, own in zip(places, read, features, strict=True):
            found[place] = {**row, **own}
    return found
