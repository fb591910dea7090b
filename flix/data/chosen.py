"""Rows that were chosen by what they are of, such as those to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.data.columns import Table
from flix.data.rows import Row, read_numbered


class ChosenRows:
    """Rows by number, with the cell of each.

    Attributes:
        cells: int64 ``[n]``, the cell of each row, a place in ``names``.
        names: the cells' names.
        seen: bool ``[cells]``, whether a cell is trained on.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        numbers: NDArray[np.int64],
        cells: NDArray[np.int64],
        names: Sequence[str],
        seen: NDArray[np.bool_],
    ) -> None:
        self._tables = tuple(tables)
        self._numbers = numbers
        self.cells = cells
        self.names = tuple(names)
        self.seen = seen

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> Row:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Row]:
        """Rows, as :class:`flix.data.rows.TrainRows` gives them."""
        return read_numbered(self._tables, self._numbers[np.asarray(places, np.int64)])

    def select(self, places: NDArray[Any]) -> ChosenRows:
        """Some of the rows, by number or by mask."""
        return ChosenRows(
            self._tables, self._numbers[places], self.cells[places], self.names, self.seen
        )

    def limited(self, limit: int | None) -> ChosenRows:
        """The first rows of every cell."""
        if limit is None or not len(self):
            return self
        keep = [np.flatnonzero(self.cells == c)[:limit] for c in np.unique(self.cells).tolist()]
        return self.select(np.sort(np.concatenate(keep)))
