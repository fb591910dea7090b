"""Initial values of the low-rank pairs (SPEC §1): A uniform, B zero, the same bytes in every backend."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from flix.core import counter


def initial_a(
    *, seed: int, layer: str, group: str, feature: str, rank: int, d_in: int
) -> NDArray[np.float32]:
    """A_f ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), what Kaiming with a = sqrt(5) gives and LoRA uses.

    The value at (i, j) is a function of (seed, layer, group, feature, i * d_in + j) alone: adding or
    reordering features or layers changes nothing, and a larger rank keeps the rows of a smaller one.

    Returns:
        float32 ``[rank, d_in]``.
    """
    words = counter.key("A", seed, layer, group, feature)
    position = np.arange(rank * d_in, dtype=np.uint64).reshape(rank, d_in)
    # 24 leading bits fit a float32 exactly: in [-1, 1), then one rounding by the bound.
    unit = (counter.bits(words, position) >> np.uint64(40)).astype(np.float32)
    unit = unit * np.float32(2.0**-23) - np.float32(1.0)
    return unit * np.float32(1.0 / math.sqrt(max(d_in, 1)))


def initial_b(*, rank: int, d_out: int) -> NDArray[np.float32]:
    """B_f = 0, so that the adapted model starts equal to the base: float32 ``[d_out, rank]``."""
    return np.zeros((d_out, rank), dtype=np.float32)
