"""How launches of the fused kernels for GPUs cut their work: block sizes and grids, from shapes alone.

Chosen by counting bytes and registers: ``tests/backends/torch/kernels/compile_kernels.py`` holds registers and shared
memory to what a Hopper chip has. docs/speed.md has times on one, which no search has tried to lower.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

# Programs wanted of a launch: some for every multiprocessor of a large GPU. With partial gradients fewer, since each
# program's partial sums cost memory traffic of their own.
_PROGRAMS = 512
_PROGRAMS_GRAD = 132
_SLOTS = 64
# Bytes of partial sums by row that are made whatever the rows' length is.
_PARTIAL_BYTES = 64 * 2**20
# Tokens that one program goes through at most for a feature's gradient, and bytes of the sums that several leave.
_SERIAL = 512
_SERIAL_BYTES = 64 * 2**20
# Partial products into the ranks that a program of the next launch sums itself, times their slots.
_CHUNKS = 128


def power(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()


def parts(n: int, size: int) -> int:
    """How many parts of a size cover n."""
    return -(-n // size)


def _block(n: int, most: int) -> int:
    """A block for n things: a power of two, 16 or more as products want it."""
    return min(most, max(16, power(n)))


@dataclass(frozen=True)
class Blocks:
    """How a launch into the ranks or out of them cuts its work.

    Attributes:
        tokens, columns, slots: of a tile.
        chunks: of columns.
        blocks: of slots.
        span: tokens of a piece of a row.
        pieces: of a row.
        warps: of a program.
        stages: of its pipelined loads.
    """

    tokens: int
    columns: int
    slots: int
    chunks: int
    blocks: int
    span: int
    pieces: int
    warps: int
    stages: int

    @property
    def many(self) -> bool:
        """Whether the next launch is spared summing the chunks in every program of a column."""
        return self.chunks > 1 and self.chunks * self.slots > _CHUNKS


@lru_cache(maxsize=1024)
def cut(count: int, length: int, slots: int, size: int, itemsize: int, grad: bool) -> Blocks:
    """Blocks for ``count`` rows of ``length`` tokens, ``slots`` slots and ``size`` columns."""
    block_s = _block(slots, _SLOTS)
    # The accumulator of the gradients, [slots, columns] in float32, must stay in registers.
    block_c = _block(size, max(16, 512 * 16 // block_s // max(1, itemsize // 2)))
    block_t = _block(length, 32)
    chunks, blocks = parts(size, block_c), parts(slots, block_s)
    wanted = (_PROGRAMS_GRAD if grad else _PROGRAMS) // max(1, count * chunks * blocks)
    pieces = max(1, min(wanted, parts(length, 4 * block_t)))
    span = parts(parts(length, pieces), block_t) * block_t
    return Blocks(
        tokens=block_t,
        columns=block_c,
        slots=block_s,
        chunks=chunks,
        blocks=blocks,
        span=span,
        pieces=parts(length, span),
        warps=8 if block_c * max(block_t, block_s) >= 4096 else 4,
        stages=3 if blocks == 1 else 1,
    )


def partial(count: int, length: int, slots: int, sizes: int) -> bool:
    """Whether gradients are summed piece by piece of a row first, rather than from each feature's tokens.

    A feature that all rows share has all tokens, which few programs would go through one after the other. Where rows
    have more slots than tokens, partial sums would be larger than what they are made of.

    Args:
        count: rows.
        length: their tokens.
        slots: of a row.
        sizes: columns of both sides.
    """
    if length == 1 or slots > _SLOTS:
        return False
    return slots <= length or 4 * count * slots * sizes <= _PARTIAL_BYTES


def splits(tokens: int, rows: int, size: int) -> int:
    """How many programs share the tokens of a feature, each with a sum of its own.

    Args:
        tokens: of the batch; a feature may be that of all of them.
        rows: of the bank.
        size: columns.
    """
    room = _SERIAL_BYTES // max(1, 4 * rows * size)
    return max(1, min(parts(tokens, _SERIAL), room, 32))


class TokenBlocks(NamedTuple):
    """How the launch for tokens with slots of their own cuts its work.

    Attributes:
        span: columns of the output that one program writes.
        into, out_of, slots: columns of the input and of the output, and slots, of a tile.
    """

    span: int
    into: int
    out_of: int
    slots: int


@lru_cache(maxsize=1024)
def cut_tokens(tokens: int, slots: int, size_in: int, size_out: int) -> TokenBlocks:
    """Blocks for single tokens: few tokens share the output's columns among several programs."""
    block_s = power(slots)
    shares = max(1, min(4, _PROGRAMS_GRAD // max(1, tokens)))
    block = max(16, min(512, 8192 // block_s))
    span = parts(parts(size_out, shares), block) * block
    return TokenBlocks(span, _block(size_in, block), _block(size_out, block), block_s)


def cut_parts(size_a: int, size_b: int) -> int:
    """Columns of a tile of the launch that sums partial gradients."""
    return _block(max(size_a, size_b), 512)


def cut_feature(rank: int, size: int) -> tuple[int, int, int]:
    """Slots and columns of a tile, and warps, of the launch that sums a feature's gradient from its tokens."""
    slots = _block(rank, _SLOTS)
    return slots, _block(size, 128), 8 if slots == _SLOTS else 4
