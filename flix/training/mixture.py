"""Which row is trained on when: a pure function of the seed and the position, so that a resumed run goes on alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flix.core.sampling.schedule import Schedule, probabilities
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

    Cells get their shares by p ∝ n^(1/temperature). The run goes through epochs of as many rows as there are examples;
    a cell's rows are all seen before any is seen again (:class:`flix.core.sampling.schedule.Schedule`).

    Args:
        examples: the training rows.
        length: how many rows the run draws.
        temperature: 1 draws cells by their size, larger values level them out.
        seed: of the order.

    Raises:
        MixtureError: no examples, or a temperature of 0 or less.
    """

    def __init__(self, examples: Examples, *, length: int, temperature: float, seed: int) -> None:
        self.examples = examples
        self.length = length
        self.cells, counts = np.unique(examples.cells, return_counts=True)
        self._order = np.argsort(examples.cells, kind="stable")
        self.probabilities: NDArray[np.float64] = probabilities(counts, temperature)
        self._schedule = Schedule(counts, self.probabilities, length=len(examples), seed=seed)

    def __len__(self) -> int:
        return self.length

    def draw(self, positions: Sequence[int]) -> NDArray[np.int64]:
        """The places, among the examples, of the rows drawn at these positions: int64 ``[n]``."""
        places: NDArray[np.int64] = self._order[self._schedule.draw(positions)]
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
