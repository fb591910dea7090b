"""Mixtures of cells: with what probability each is drawn, and which rows an epoch takes.

Cells are drawn with p ∝ n^(1/T), where n is a cell's number of rows, at most its cap: the temperature sampling of
multilingual training (Arivazhagan et al., arXiv 1907.05019, §4.2; the cap is the size limit of Raffel et al., arXiv
1910.10683, §3.5.2). T = 1 follows the sizes; T = infinity draws all cells alike.

What an epoch takes is a pure function of (seed, epoch). Counts follow the probabilities by largest remainder, and what
an epoch gave too much or too little is carried to the next. A cell's rows are walked through seeded permutations; the
walk goes on where the epoch before stopped, so every row of a cell is seen before any is seen again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from flix.core import rng
from flix.core.checks import is_number, whole
from flix.core.features.cells import MixtureError

Sizes = Sequence[int] | NDArray[np.int64]


def shares(counts: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """``counts ** exponent``, divided by its sum; what counts nothing has no share.

    Args:
        counts: ``[cells]``, 0 or more, one of them above 0.
        exponent: 0 or more.
    """
    if exponent > 1.0:  # so that no power overflows
        counts = counts / counts.max()
    weights = np.where(counts > 0, counts**exponent, 0.0)
    return np.asarray(weights / weights.sum(), np.float64)


def probabilities(
    sizes: Sizes,
    temperature: float = 1.0,
    caps: Sequence[float] | NDArray[np.float64] | None = None,
    names: Sequence[str] | None = None,
) -> NDArray[np.float64]:
    """With what probability each cell is drawn: p ∝ min(n, cap)^(1/temperature), float64 ``[cells]``.

    Args:
        sizes: rows of each cell.
        temperature: above 0; ``math.inf`` draws all cells alike.
        caps: the most rows that each cell counts for; ``math.inf`` where there is no cap.
        names: the cells' names, for messages.

    Raises:
        MixtureError: no cell, an empty cell, a temperature of 0 or less, a cap below 1.
    """
    counted = _sizes(sizes, names).astype(np.float64)
    check_temperature(temperature)
    if caps is not None:
        limits = np.asarray(caps, np.float64)
        if limits.shape != counted.shape:
            raise MixtureError(f"there are {len(counted)} cells and {limits.size} caps")
        if not (limits >= 1).all():
            raise MixtureError(f"a cap must be 1 or more, got {float(limits[~(limits >= 1)][0])!r}")
        counted = np.minimum(counted, limits)
    return shares(counted, 1.0 / temperature)


def check_temperature(value: object) -> None:
    """Refuse what is not a temperature.

    Raises:
        MixtureError: no number, or 0 or less.
    """
    if not is_number(value) or not value > 0:  # type: ignore[operator]
        raise MixtureError(f"temperature must be a number above 0, got {value!r}")


def _sizes(sizes: Sizes, names: Sequence[str] | None) -> NDArray[np.int64]:
    counts = np.asarray(sizes)
    if counts.ndim != 1 or not counts.size:
        raise MixtureError("a mixture needs at least one cell, got none")
    if counts.dtype.kind not in "iu":
        raise MixtureError(f"sizes are whole numbers of rows, got {counts.dtype}")
    if (counts < 1).any():
        place = int(np.argmax(counts < 1))
        cell = f"cell {names[place]!r}" if names is not None else f"cell {place}"
        raise MixtureError(f"{cell} is empty; a cell needs at least one row")
    return counts.astype(np.int64)


def apportion(claims: NDArray[np.float64], length: int) -> NDArray[np.int64]:
    """Whole numbers nearest to claims, by largest remainder; ties go to the first.

    Args:
        claims: ``[cells]``, summing to ``length``; below 0 where a cell had more than its share before.
        length: what the result sums to.

    Returns:
        int64 ``[cells]``, 0 or more.
    """
    counts = np.floor(np.maximum(claims, 0.0) + 1e-9).astype(np.int64)
    # Rounded, so that the last bit does not decide which of two equal remainders wins.
    left = np.round(claims - counts, 6)
    short = length - int(counts.sum())
    if short > 0:
        counts[np.argsort(-left, kind="stable")[:short]] += 1
    for _ in range(-short):  # cells ahead of their share cannot give rows back: others wait
        place = int(np.argmin(np.where(counts > 0, left, np.inf)))
        counts[place] -= 1
        left[place] += 1
    return counts


def walk(
    size: int, start: int, count: int, words: tuple[np.uint64, np.uint64]
) -> NDArray[np.int64]:
    """Steps ``start`` to ``start + count - 1`` of an endless walk through a cell's rows.

    The walk goes through one random permutation of the rows after another.

    Args:
        size: rows of the cell.
        start: steps gone before.
        count: steps to go.
        words: the key of the cell.

    Returns:
        int64 ``[count]``, places in the cell.
    """
    if not count:
        return np.zeros(0, np.int64)
    first, last = start // size, (start + count - 1) // size
    cycles = np.arange(first, last + 1, dtype=np.int64)[:, None]
    drawn = rng.bits(words, cycles, np.arange(size, dtype=np.int64)[None])
    steps = np.argsort(drawn, axis=1, kind="stable").ravel()
    begin = start - first * size
    return steps[begin : begin + count].astype(np.int64)


class Schedule:
    """What each epoch of a mixture takes.

    Rows are numbered through the cells: those of cell 0 first, then those of cell 1, and so on.

    Args:
        sizes: rows of each cell, ``[cells]``.
        probabilities: of each cell, ``[cells]``, summing to 1.
        length: rows of an epoch.
        seed: of the order and of the walks.
        names: the cells' names, which key their walks: a cell that is added changes no other's. Default: their
            numbers.

    Raises:
        MixtureError: no cell, an empty cell, probabilities that do not fit, or a length below 1.
    """

    def __init__(
        self,
        sizes: Sizes,
        probabilities: Sequence[float] | NDArray[np.float64],
        *,
        length: int,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> None:
        self.sizes = _sizes(sizes, names)
        self.probabilities: NDArray[np.float64] = np.asarray(probabilities, np.float64)
        if self.probabilities.shape != self.sizes.shape:
            raise MixtureError(
                f"there are {len(self.sizes)} cells and {self.probabilities.size} probabilities"
            )
        if not (self.probabilities >= 0).all() or abs(self.probabilities.sum() - 1) > 1e-9:
            raise MixtureError("probabilities must be 0 or more and sum to 1")
        self.length = whole(length, "an epoch's length", 1, MixtureError)
        keys: Iterable[int | str] = range(len(self.sizes)) if names is None else names
        self._walks = [rng.key("mixture rows", seed, name) for name in keys]
        self._order = rng.key("mixture order", seed)
        self._offsets = np.cumsum(self.sizes) - self.sizes
        self._reached = (0, np.zeros(len(self.sizes), np.int64))
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def taken(self, epoch: int) -> NDArray[np.int64]:
        """How many rows of each cell all epochs before this one took: int64 ``[cells]``."""
        epoch = whole(epoch, "an epoch", 0, MixtureError)
        reached, taken = self._reached
        if reached > epoch:
            reached, taken = 0, np.zeros(len(self.sizes), np.int64)
        while reached < epoch:
            reached, taken = reached + 1, taken + self._share(reached, taken)
        self._reached = (reached, taken)
        return taken.copy()

    def counts(self, epoch: int) -> NDArray[np.int64]:
        """How many rows of each cell an epoch takes: int64 ``[cells]``, summing to the epoch's length."""
        return self._share(epoch, self.taken(epoch))

    def _share(self, epoch: int, taken: NDArray[np.int64]) -> NDArray[np.int64]:
        """The counts of an epoch: what all epochs so far should have had, less what they had."""
        due = self.probabilities * float((epoch + 1) * self.length)
        return apportion(due - taken, self.length)

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """The rows of an epoch in their order: int64 ``[length]``."""
        taken = self.taken(epoch)
        counts = self._share(epoch, taken)
        rows = np.concatenate(
            [
                offset + walk(size, start, count, words)
                for offset, size, start, count, words in zip(
                    self._offsets.tolist(),
                    self.sizes.tolist(),
                    taken.tolist(),
                    counts.tolist(),
                    self._walks,
                    strict=True,
                )
            ]
        )
        drawn = rng.bits(self._order, np.array(epoch), np.arange(self.length, dtype=np.int64))
        return np.asarray(rows[np.argsort(drawn, kind="stable")], np.int64)

    def draw(self, positions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows at positions of an endless run, epoch after epoch: int64 ``[n]``.

        A function of (seed, position) alone. The latest two epochs are kept, so positions in ascending order cost
        one look an epoch.
        """
        where = np.asarray(positions, np.int64)
        epochs, places = np.divmod(where, self.length)
        rows = np.empty(len(where), np.int64)
        for epoch in np.unique(epochs).tolist():
            if epoch not in self._epochs:
                kept = list(self._epochs.items())[-1:]
                self._epochs = {**dict(kept), epoch: self.rows(epoch)}
            mine = epochs == epoch
            rows[mine] = self._epochs[epoch][places[mine]]
        return rows


def epoch_rows(
    sizes: Sizes,
    *,
    length: int,
    epoch: int = 0,
    seed: int = 0,
    temperature: float = 1.0,
    caps: Sequence[float] | NDArray[np.float64] | None = None,
    names: Sequence[str] | None = None,
) -> NDArray[np.int64]:
    """The rows of one epoch in their order, numbered through the cells: int64 ``[length]``.

    Raises:
        MixtureError: what :func:`probabilities` and :class:`Schedule` refuse.
    """
    p = probabilities(sizes, temperature, caps, names)
    return Schedule(sizes, p, length=length, seed=seed, names=names).rows(epoch)
