"""How the fused kernels of JAX (Pallas, for GPUs and TPUs) cut their work: sizes of tiles, from shapes alone.

Chosen by what fits the shared memory and registers of current cards; not tuned on one.
"""

from __future__ import annotations

from flix.core.strategy.blocks import power

TILE = 16
"""The least size of a matrix product in Triton, and a multiple of a TPU's tiles."""

_POSITIONS = (64, 32, 16)  # of a block
_SUMMED = 8192  # values that a program sums at once
_COLUMNS = {2: 64, 4: 32, 8: 16}  # of a table's slice on a GPU, by the bytes of a value


def padded_rank(widest: int) -> int:
    """Rows of a feature's block: the next power of two, 16 or more."""
    return max(TILE, power(widest))


def positions(length: int, rank: int) -> int:
    """Positions of a block: a power of two, at best one that divides the length."""
    most = max(_SUMMED // rank, TILE)
    sizes = [size for size in _POSITIONS if size <= most]
    fitting = [size for size in sizes if length % size == 0]
    enough = [size for size in sizes if size >= length]
    return fitting[0] if fitting else enough[-1] if enough else sizes[0]


def gpu_columns(d: int, itemsize: int, rank: int = 1) -> int:
    """Columns of one slice of a block of this rank: a power of two, 16 or more, that divides d."""
    size = _COLUMNS[itemsize]
    while d % size or (size > TILE and rank * size > _SUMMED):
        size //= 2
    return size


def tpu_columns(d: int) -> int:
    """Columns of one block: 128 to 512 where they divide d, else all."""
    return next((size for size in (512, 256, 128) if d % size == 0), d)
