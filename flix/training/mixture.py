"""Which row is trained on when: a pure function of the seed and the position, so that a resumed run goes on alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flix.core import counter
from flix.training.corpus import Examples
from flix.training.sources import Row


@dataclass(frozen=True)
class Item:
    """A row on its way into a batch.

    Attributes:
        row: the row.
        combination: its features' place in the corpus' combinations.
        position: its number among all rows that the run draws; None outside training.
    """

    row: Row
    combination: int
    position: int | None = None


class Mixture:
    """The training rows of a run as a dataset: item ``i`` is the i-th row drawn.

    Each draw takes a cell with p ∝ n^(1/temperature), then one of its rows, uniformly and with replacement.

    Args:
        examples: the training rows.
        length: how many rows the run draws.
        temperature: 1 draws cells by their size, larger values level them out.
        seed: of the draws.
    """

    def __init__(self, examples: Examples, *, length: int, temperature: float, seed: int) -> None:
        self.examples = examples
        self.length = length
        self.cells, counts = np.unique(examples.cells, return_counts=True)
        self._order = np.argsort(examples.cells, kind="stable")
        self._starts = np.cumsum(counts) - counts
        self._counts = counts
        claim = (counts / counts.max()) ** (1.0 / temperature)
        self.probabilities: NDArray[np.float64] = claim / claim.sum()
        self._edges = np.cumsum(self.probabilities)
        self._cell_key = counter.key("mixture cell", seed)
        self._row_key = counter.key("mixture row", seed)

    def __len__(self) -> int:
        return self.length

    def draw(self, positions: Sequence[int]) -> NDArray[np.int64]:
        """The places, among the examples, of the rows drawn at these positions: int64 ``[n]``."""
        where = np.asarray(positions, dtype=np.int64)
        chosen = np.searchsorted(self._edges, counter.uniform(self._cell_key, where), side="right")
        chosen = np.minimum(chosen, len(self.cells) - 1)
        within = counter.uniform(self._row_key, where) * self._counts[chosen]
        places: NDArray[np.int64] = self._order[self._starts[chosen] + within.astype(np.int64)]
        return places

    def __getitem__(self, position: int) -> Item:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        return [
            Item(self.examples.rows[place], int(self.examples.combinations[place]), int(position))
            for position, place in zip(positions, self.draw(positions).tolist(), strict=True)
        ]


def items(examples: Examples) -> list[Item]:
    """Rows outside training, as items in their order."""
    return [
        Item(row, combination)
        for row, combination in zip(examples.rows, examples.combinations.tolist(), strict=True)
    ]
