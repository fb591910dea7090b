"""What pairs start with (docs/specification.md §1.3): A uniform or orthonormal, B zero, in every backend alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flix.core import rng
from flix.core.features.names import Feature

# Values made at a time: what the arithmetic leaves behind in between should stay in the cache.
_VALUES = 1 << 16


def initial_a(
    *, seed: int, layer: str, group: str, feature: str, rank: int, d_in: int
) -> NDArray[np.float32]:
    """A_f ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), what Kaiming with a = sqrt(5) gives and LoRA uses.

    The value at (i, j) is a function of (seed, layer, group, feature, i * d_in + j) alone: adding or
    reordering features or layers changes nothing, and a larger rank keeps the rows of a smaller one.

    Returns:
        float32 ``[rank, d_in]``.
    """
    return initial_table(
        seed=seed, layer=layer, features=[(group, feature)], ranks=[rank], d_in=d_in
    )


def initial_table(
    *, seed: int, layer: str, features: Sequence[Feature], ranks: Sequence[int], d_in: int
) -> NDArray[np.float32]:
    """:func:`initial_a` of several features of a layer, one after the other: float32 ``[sum of ranks, d_in]``."""
    total = int(sum(ranks))
    table = np.empty((total, d_in), np.float32)
    first, second = rng.keys(("A", seed, layer), features)
    first, second = np.repeat(first, ranks)[:, None], np.repeat(second, ranks)[:, None]
    starts = np.cumsum(ranks) - ranks
    row = (np.arange(total) - np.repeat(starts, ranks)).astype(np.uint64)[:, None]
    column = np.arange(d_in, dtype=np.uint64)
    bound = np.float32(1.0 / math.sqrt(max(d_in, 1)))
    step = max(1, _VALUES // max(d_in, 1))
    for begin in range(0, total, step):
        part = slice(begin, begin + step)
        position = row[part] * np.uint64(d_in) + column
        # 24 leading bits fit a float32 exactly: in [-1, 1), then one rounding by the bound.
        unit = table[part]
        unit[...] = rng.bits((first[part], second[part]), position) >> np.uint64(40)
        unit *= np.float32(2.0**-23)
        unit -= np.float32(1.0)
        unit *= bound
    return table


def initial_pairs(
    *,
    seed: int,
    layer: str,
    ranks: Mapping[Feature, int],
    d_in: int,
    d_out: int,
    experts: int = 0,
    init: str = "uniform",
) -> dict[Feature, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """A and B of a layer's features as they start; those of rank 0 are left out.

    Expert e of a layer starts as a layer of the path ``<layer>.<e>`` would: a larger rank keeps every expert's values.
    With ``init="orthogonal"`` each A is :func:`orthonormal`.
    """
    chosen = {feature: rank for feature, rank in ranks.items() if rank}
    if experts:
        paths = (f"{layer}.{e}" for e in range(experts))
        each = [
            initial_pairs(seed=seed, layer=path, ranks=chosen, d_in=d_in, d_out=d_out, init=init)
            for path in paths
        ]
        return {
            f: (np.stack([e[f][0] for e in each]), np.stack([e[f][1] for e in each]))
            for f in chosen
        }
    table = initial_table(
        seed=seed, layer=layer, features=list(chosen), ranks=list(chosen.values()), d_in=d_in
    )
    ends = itertools.accumulate(chosen.values())
    made = orthonormal if init == "orthogonal" else _as_it_is
    return {
        feature: (made(table[end - rank : end]), initial_b(rank=rank, d_out=d_out))
        for (feature, rank), end in zip(chosen.items(), ends, strict=True)
    }


def _as_it_is(a: NDArray[np.float32]) -> NDArray[np.float32]:
    return a


def orthonormal(a: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows of A made orthonormal one after the other (Gram and Schmidt), in float64, rounded to float32 at the end.

    A larger rank so keeps the rows of a smaller one. Beyond d_in rows, of which there are no more, the next d_in begin
    anew.

    Args:
        a: ``[r, d_in]``, as :func:`initial_a` gives it.
    """
    parts, step = [], a.shape[1]
    if not a.size:
        return a
    for begin in range(0, len(a), step):
        q, r = np.linalg.qr(a[begin : begin + step].astype(np.float64).T)
        # The factors are unique where the diagonal of R is positive: then they are Gram's and Schmidt's.
        parts.append((q * np.where(np.diagonal(r) < 0, -1.0, 1.0)).T)
    return np.concatenate(parts).astype(np.float32)


def dropout_seed(seed: int, layer: str) -> int:
    """Where a layer's generator of masks for ``lora_dropout`` begins, if it has one of its own: 31 bits."""
    return int(rng.key("dropout", seed, layer)[0] >> np.uint64(33))


def initial_b(*, rank: int, d_out: int) -> NDArray[np.float32]:
    """B_f = 0, so that the adapted model starts equal to the base: float32 ``[d_out, rank]``."""
    return np.zeros((d_out, rank), dtype=np.float32)
