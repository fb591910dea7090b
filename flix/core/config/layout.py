"""How a batch's routing falls onto a layer's ranks: the pure half of every backend's forward.

A batch activates a few features; their rows of A (and columns of B), stacked in the order of their ids, are the
batch's *union*. Each row of the batch uses some rows of the union, each with a factor. Everything a strategy needs
follows from that: gather takes the rows of each example, masked multiplies with the whole union and masks,
single takes one composition for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import ConfigError

STRATEGIES = ("auto", "gather", "masked", "single", "fused")


@dataclass(frozen=True)
class LayerLayout:
    """Ranks and scales of all registered features in one layer, by id. Hashable: layers share plans.

    Attributes:
        ranks: r_f of each feature; 0 where the feature has no update.
        scales: s_f of each feature.
    """

    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        # Looked up once a layer and a forward; with thousands of features, making them afresh would show.
        object.__setattr__(self, "_hash", hash((self.ranks, self.scales)))
        arrays = (
            np.asarray((*self.ranks, 0), dtype=np.int64),
            np.asarray((*self.scales, 0.0), dtype=np.float64),
        )
        object.__setattr__(self, "_arrays", arrays)

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined,no-any-return]

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ranks and scales, each with a 0 at the end, which an id of -1 finds; not to be written to."""
        return self._arrays  # type: ignore[attr-defined,no-any-return]


@dataclass(frozen=True, eq=False)
class UnionPlan:
    """The routing of a batch of N rows in one layout.

    Attributes:
        active: ids of the features that some row activates and that have an update here, ascending.
        union: the number of union rows, U: the sum of the active features' ranks.
        rows: int64 ``[N, R]``: the union row of each slot of each example; 0 where unused.
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

    rows = np.zeros((count, longest), dtype=np.int64)
    slots = np.zeros((count, longest), dtype=np.int64)
    factor = np.zeros((count, longest), dtype=np.float64)
    rows[row, column] = offsets[feature] + within
    slots[row, column] = slot
    factor[row, column] = scales[feature]
    return UnionPlan(
        active=tuple(active.tolist()),
        union=int(ranks[active].sum()),
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


def first_unlike(ids: NDArray[Any], weights: NDArray[Any] | None) -> int | None:
    """The first row whose composition differs from row 0's; None if all rows are alike."""
    if len(ids) == 0:
        return None
    unlike = (ids != ids[0]).any(axis=tuple(range(1, ids.ndim)))
    if weights is not None:
        unlike |= (weights != weights[0]).any(axis=tuple(range(1, ids.ndim)))
    return int(np.argmax(unlike)) if unlike.any() else None


def check_strategy(strategy: str) -> None:
    """Refuse an unknown strategy.

    Raises:
        ConfigError: no such strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")


# Rows per example from which batched products over gathered rows beat one masked product over the union.
# Measured on CPU (benchmarks/layer.py --crossover): gathering copies R * (d_in + d_out) values an example,
# which few tokens do not repay; the masked product computes U / R times as much.
_GATHER_TOKENS = 8


def choose_strategy(strategy: str, *, examples: int, tokens: int) -> str:
    """The strategy to run, from shapes alone.

    Args:
        strategy: what the user asked for; anything but ``"auto"`` is returned as it is.
        examples: rows of the routing, N.
        tokens: positions of the input that share one row of the routing.

    Raises:
        ConfigError: no such strategy.
    """
    check_strategy(strategy)
    if strategy != "auto":
        return strategy
    if examples == 1:
        return "single"
    return "gather" if tokens >= _GATHER_TOKENS else "masked"
