"""How a batch's routing falls onto a layer's ranks: what every strategy needs to know of a batch.

A batch activates a few features; their rows of A (and columns of B), stacked in the order of their ids, are the
batch's *union*. Each row of the batch uses some rows of the union, each with a factor. Gather takes the rows of each
example, masked multiplies with the whole union and masks, single takes one composition for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.config.layout import LayerLayout


@dataclass(frozen=True, eq=False)
class UnionPlan:
    """The routing of a batch of N rows in one layout.

    Attributes:
        active: ids of the features that some row activates and that have an update here, ascending.
        union: the number of union rows, U: the sum of the active features' ranks.
        rows: int64 ``[N, R]``: the union row of each slot of each example; U, a row of none, where unused.
        slots: int64 ``[N, R]``: which column of the routing each slot came from.
        scales: float64 ``[N, R]``: s_f of each slot; 0 where unused.
        blocks: the slots again, pair by pair: for each example, the places in ``active`` of its features, and -n for
            n unused slots at its end.
    """

    active: tuple[int, ...]
    union: int
    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    scales: NDArray[np.float64]
    blocks: tuple[int, ...]

    @property
    def width(self) -> int:
        """The number of slots of an example, R: the largest total rank of a row."""
        return int(self.rows.shape[1])

    def grouped(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """What fused kernels need: rows, -1 where unused, and the slots of each union row.

        Returns:
            rows: ``[N, R]``.
            order, starts: ``order[starts[u]:starts[u + 1]]`` are the slots (n * R + slot) of union row u.
        """
        used = self.scales != 0
        flat = np.where(used, self.rows, self.union).ravel()
        order = np.argsort(flat, kind="stable")
        starts = np.searchsorted(flat[order], np.arange(self.union + 1))
        rows = np.where(used, self.rows, -1)
        return rows.astype(np.int32), order.astype(np.int32), starts.astype(np.int32)


def plan_union(ids: NDArray[Any], layout: LayerLayout, touched: tuple[int, ...] = ()) -> UnionPlan:
    """Place a batch's routing on the union of its active features.

    Args:
        ids: integer ``[N, W]``, -1 for padding, already checked.
        layout: the layer's ranks and scales.
        touched: ids that join the union although no row of this batch activates them.
    """
    ranks, scales = layout.arrays()
    count, width = ids.shape
    present = np.unique(np.append(ids.ravel(), np.asarray(touched, dtype=ids.dtype)))
    active = present[(present >= 0) & (ranks[present] > 0)]
    offsets = np.zeros(len(ranks), dtype=np.int64)
    offsets[active] = np.cumsum(ranks[active]) - ranks[active]

    lengths = ranks[ids]
    ends = np.cumsum(lengths, axis=1)
    longest = int(ends[:, -1].max(initial=0)) if width else 0
    flat = lengths.ravel()
    entry = np.repeat(np.arange(count * width), flat)
    within = np.arange(len(entry)) - np.repeat(np.cumsum(flat) - flat, flat)
    row, slot = np.divmod(entry, max(width, 1))
    column = (ends - lengths).ravel()[entry] + within
    feature = ids.ravel()[entry]

    union = int(ranks[active].sum())
    rows = np.full((count, longest), union, dtype=np.int64)
    slots = np.zeros((count, longest), dtype=np.int64)
    factor = np.zeros((count, longest), dtype=np.float64)
    rows[row, column] = offsets[feature] + within
    slots[row, column] = slot
    factor[row, column] = scales[feature]
    return UnionPlan(
        active=tuple(active.tolist()),
        union=union,
        rows=rows,
        slots=slots,
        scales=factor,
        blocks=_blocks(ids, lengths, active, longest),
    )


def _blocks(
    ids: NDArray[Any], lengths: NDArray[np.int64], active: NDArray[Any], longest: int
) -> tuple[int, ...]:
    """See :class:`UnionPlan`: one entry for each pair of each example, and one for what it leaves unused."""
    places = np.searchsorted(active, ids)
    free = longest - lengths.sum(1, keepdims=True)
    entries = np.concatenate([places, -free], axis=1)
    used = np.concatenate([lengths > 0, free > 0], axis=1)
    return tuple(entries[used].tolist())


def first_unlike(ids: NDArray[Any], weights: NDArray[Any] | None) -> tuple[int, ...] | None:
    """The first row whose composition differs from the first's, or by token the first row and position.

    Args:
        ids: ``[B, W]`` or ``[B, T, W]``.
        weights: None, or in that shape.

    Returns:
        ``(row,)`` or ``(row, position)``; None if all are alike.
    """
    unlike = np.zeros((), bool)
    for values in (ids,) if weights is None else (ids, weights):
        rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
        unlike = unlike | (rows != rows[:1]).any(1)
    if not unlike.any():
        return None
    return tuple(int(n) for n in np.unravel_index(np.argmax(unlike), ids.shape[:-1]))


def bank_rows(
    ranks: Sequence[int],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of each row of a bank of features with these ranks: its feature's first row and rank, and its slot."""
    counts = np.asarray(ranks, dtype=np.int64)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return first, np.repeat(counts, counts), np.arange(len(first)) - first


@dataclass(frozen=True, eq=False)
class BankPart:
    """The part of a bank that a batch uses.

    Attributes:
        features: places in the bank of the features in use, ascending.
        rows: int64 ``[N, R']``: rows of the stack of these features; the stack's size where a slot is unused. R' slots
            are those up to the last that some row of the batch uses.
        starts, ends: the bank's rows that each feature in use begins and ends at.
    """

    features: NDArray[np.int64]
    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    @property
    def own(self) -> NDArray[np.int64]:
        """The bank's rows that are in the stack."""
        spans = zip(self.starts, self.ends, strict=True)
        return np.concatenate([np.arange(0), *(np.arange(*span) for span in spans)])


def bank_part(rows: NDArray[np.integer[Any]], ranks: Sequence[int]) -> BankPart:
    """The part of a bank of features with these ranks that is used by rows ``[N, R]``, -1 where a slot is unused."""
    taken = np.flatnonzero((rows >= 0).any(axis=0))
    rows = rows[:, : int(taken[-1]) + 1 if len(taken) else 0].astype(np.int64)
    sizes = np.asarray(ranks, dtype=np.int64)
    used, ends = rows >= 0, np.cumsum(sizes)
    owner = np.searchsorted(ends, rows, side="right")
    features = np.unique(owner[used])
    mine, ends = sizes[features], ends[features]
    shift = np.cumsum(mine) - ends
    place = np.minimum(np.searchsorted(features, owner), len(features) - 1)
    stacked = np.where(used, rows + shift[place], mine.sum())
    return BankPart(features, stacked, ends - mine, ends)
