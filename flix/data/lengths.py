"""Rows dealt to batches by length, so that less of a batch is padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flix.core import rng
from flix.core.checks import whole
from flix.core.features.cells import MixtureError

Row = dict[str, Any]


class SimilarLengths:
    """The rows of a run, in an order in which each batch holds rows of similar length.

    Rows move within a stretch of some batches: the stretch is sorted by length and cut into batches, and these come in
    an order drawn by the seed. So a run has the same rows, and each within a stretch of where it was. What stands at
    a position depends on the rows and the seed alone, whatever was read before.

    Args:
        rows: read by position; their order must not change, as that of ``mixture.run(n)`` does not.
        batch: rows of a step, over all processes.
        length: of a row; any number that grows with what the row costs.
        seed: of the order of batches.
        batches: of a stretch.

    Raises:
        MixtureError: a number of rows or batches below 1.
    """

    def __init__(
        self,
        rows: Any,
        batch: int,
        length: Callable[[Row], float],
        *,
        seed: int = 0,
        batches: int = 16,
    ) -> None:
        self.rows, self.length, self.seed = rows, length, seed
        self.batch = whole(batch, "the rows of a batch", 1, MixtureError)
        self._stretch = self.batch * whole(batches, "the batches of a stretch", 1, MixtureError)
        self._last: tuple[int, list[Row]] = (-1, [])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Row:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Row]:
        """Several rows at once.

        Raises:
            IndexError: a position beyond the end.
        """
        for position in positions:
            if not 0 <= position < len(self):
                raise IndexError(f"position {position} of a run of {len(self)} rows")
        places = (divmod(position, self._stretch) for position in positions)
        return [self._dealt(stretch)[place] for stretch, place in places]

    def _dealt(self, stretch: int) -> list[Row]:
        """The rows of a stretch in their order; the last stretch is kept, since the next rows are of it, too."""
        if self._last[0] != stretch:
            first = stretch * self._stretch
            numbers = range(first, min(first + self._stretch, len(self)))
            found = self.rows.__getitems__(list(numbers))
            self._last = stretch, [found[i] for i in self._order(stretch, found)]
        return self._last[1]

    def _order(self, stretch: int, found: Sequence[Row]) -> list[int]:
        by_length = np.argsort([self.length(row) for row in found], kind="stable")
        full = len(found) // self.batch  # a batch that is not full stays the last
        drawn = rng.bits(rng.key("lengths", self.seed, stretch), np.arange(full))
        cut = np.split(by_length, np.arange(1, full + 1) * self.batch)
        batches = [cut[i] for i in np.argsort(drawn, kind="stable").tolist()]
        order: list[int] = np.concatenate([*batches, *cut[full:]]).tolist()
        return order
