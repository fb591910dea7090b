"""How launches cut their work: block sizes and grids, from shapes alone.

Chosen by counting bytes and registers, not measured: ``tests/backends/torch/compile_kernels.py`` holds registers and
shared memory to what a Hopper chip has; times wait for one.
"""

from __future__ import annotations

from dataclasses import dataclass

# Programs wanted of a launch: some for every multiprocessor of a large GPU. With partial gradients fewer, since each
# program's partial sums cost memory traffic of their own.
_PROGRAMS = 512
PROGRAMS_GRAD = 132
BLOCK_SLOTS = 64


def power(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()


def parts(n: int, size: int) -> int:
    """How many parts of a size cover n."""
    return -(-n // size)


@dataclass(frozen=True)
class Blocks:
    """How a launch of ``down`` or ``up`` cuts its work.

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


def cut(count: int, length: int, slots: int, size: int, itemsize: int, grad: bool) -> Blocks:
    """Blocks for ``count`` rows of ``length`` tokens, ``slots`` slots and ``size`` columns."""
    block_s = min(BLOCK_SLOTS, max(16, power(slots)))
    # The accumulator of the gradients, [slots, columns] in float32, must stay in registers.
    block_c = min(max(16, 512 * 16 // block_s // max(1, itemsize // 2)), max(16, power(size)))
    block_t = min(32, max(16, power(length)))
    chunks, blocks = parts(size, block_c), parts(slots, block_s)
    wanted = (PROGRAMS_GRAD if grad else _PROGRAMS) // max(1, count * chunks * blocks)
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
