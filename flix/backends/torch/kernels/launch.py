"""Launches of the Triton kernels: block sizes, grids, and the order of the products.

A forward is three launches: into the ranks, out of the ranks onto an empty output (with the bias), and the frozen
product, which adds itself to the output in its epilogue: reading the sum back there hides behind the product, where a
kernel after it would read and write the whole output once more. A backward is the same three for the transposed
maps, where the first two also leave partial gradients from the tiles they read anyway, and one that sums those.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl  # type: ignore[import-not-found,import-untyped]
from torch import Tensor

from flix.backends.torch.kernels import triton_kernels as kernels
from flix.backends.torch.kernels.blocks import (
    BLOCK_SLOTS,
    PROGRAMS_GRAD,
    Blocks,
    cut,
    parts,
    power,
)
from flix.backends.torch.kernels.tables import Table, bank_table

_SOURCES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# Positions a row from which partial sums by row cost less traffic than reading tokens by feature.
PARTIAL_LENGTH = 64
# Partial products into the ranks that a program of the next launch sums itself, times their slots.
_CHUNKS = 128


def _on(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _products(x: Tensor) -> dict[str, Any]:
    """How kernels multiply: float32 as torch is told to; the interpreter needs help with bfloat16."""
    return {
        "precision": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "widen": x.device.type == "cpu" and x.dtype == torch.bfloat16,
    }


def _down(
    v: Tensor,
    table: Table,
    side: str,
    rows: Tensor,
    scale: Tensor,
    h: Tensor | None,
    blocks: Blocks,
) -> tuple[Tensor, Tensor]:
    """(z ``[chunks, N, S, R]``, the partial gradients if h is given) of v ``[N, S, size]``."""
    count, length, size = v.shape
    slots = rows.shape[1]
    z = torch.empty((blocks.chunks, count, length, slots), dtype=torch.float32, device=v.device)
    part = z
    if h is not None:
        part = torch.empty(
            (count * blocks.pieces, slots, size), dtype=torch.float32, device=v.device
        )
    kernels.down[(count * blocks.pieces, blocks.chunks, blocks.blocks)](
        v,
        table.at_a if side == "a" else table.at_b,
        rows,
        scale,
        z if h is None else h,
        z,
        part,
        count * length,
        length,
        blocks.span,
        blocks.pieces,
        slots,
        size,
        source=_SOURCES[table.dtype],
        grad=h is not None,
        **_products(v),
        block_t=blocks.tokens,
        block_c=blocks.columns,
        block_s=blocks.slots,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    # Every column program of the next launch sums the chunks; of many, that costs more than a launch.
    many = blocks.chunks > 1 and blocks.chunks * blocks.slots > _CHUNKS
    return (z.sum(0, keepdim=True) if many else z), part


def _up(
    z: Tensor,
    table: Table,
    side: str,
    rows: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    blocks: Blocks,
    *,
    h: Tensor | None = None,
    x: Tensor | None = None,
) -> Tensor:
    """Fill ``out`` ``[N, S, size]``, and h if given; the partial gradients if x is given."""
    count, length, size = out.shape
    slots = rows.shape[1]
    part = z
    if x is not None:
        part = torch.empty(
            (count * blocks.pieces, slots, size), dtype=torch.float32, device=z.device
        )
    kernels.up[(count * blocks.pieces, blocks.chunks)](
        z,
        table.at_a if side == "a" else table.at_b,
        rows,
        scale,
        out if bias is None else bias,
        out if x is None else x,
        z if h is None else h,
        out,
        part,
        count * length,
        length,
        blocks.span,
        blocks.pieces,
        slots,
        size,
        chunks=z.shape[0],
        blocks=blocks.blocks,
        source=_SOURCES[table.dtype],
        biased=bias is not None,
        keep=h is not None,
        grad=x is not None,
        **_products(out),
        block_t=blocks.tokens,
        block_c=blocks.columns,
        block_s=blocks.slots,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return part


def _single(
    v: Tensor,
    table: Table,
    into: str,
    rows: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    h: Tensor,
) -> None:
    """Fill ``out`` and h for tokens with slots of their own; ``into`` is the side multiplied first."""
    tokens, size_in, size_out = v.shape[0] * v.shape[1], v.shape[2], out.shape[2]
    slots = rows.shape[1]
    block_s = power(slots)
    shares = max(1, min(4, PROGRAMS_GRAD // max(1, tokens)))
    block = max(16, min(512, 8192 // block_s))
    span = parts(parts(size_out, shares), block) * block
    at_in, at_out = (table.at_a, table.at_b) if into == "a" else (table.at_b, table.at_a)
    kernels.single_tokens[(tokens, parts(size_out, span))](
        v,
        at_in,
        at_out,
        rows,
        scale,
        out if bias is None else bias,
        h,
        out,
        v.shape[1],
        slots,
        size_in,
        size_out,
        span,
        source=_SOURCES[table.dtype],
        biased=bias is not None,
        block_i=min(block, max(16, power(size_in))),
        block_o=min(block, max(16, power(size_out))),
        block_s=block_s,
        num_warps=8,
    )


def _gather_parts(
    part_a: Tensor,
    part_b: Tensor,
    table: Table,
    order: Tensor,
    starts: Tensor,
    d_a: Tensor,
    d_b: Tensor,
    pieces: tuple[int, int],
    slots: int,
) -> None:
    """Sum the partial gradients, of ``pieces`` pieces a row on either side."""
    size_a, size_b = part_a.shape[2], part_b.shape[2]
    block_c = min(512, max(16, power(max(size_a, size_b))))
    chunks_a, chunks_b = parts(size_a, block_c), parts(size_b, block_c)
    kernels.gather_parts[(table.rows, chunks_a + chunks_b)](
        part_a,
        part_b,
        order,
        starts,
        d_a,
        d_b,
        *pieces,
        slots,
        size_a,
        size_b,
        chunks_a,
        block_e=8,
        block_c=block_c,
        num_warps=4,
    )


def _gather_tokens(
    v: Tensor,
    coefficient: Tensor,
    scale: Tensor,
    table: Table,
    order: Tensor,
    starts: Tensor,
    out: Tensor,
) -> None:
    """Fill ``out``, one side's gradient, from the tokens of each feature."""
    _, length, size = v.shape
    block_s = min(BLOCK_SLOTS, max(16, power(table.widest)))
    block_c = min(128, max(16, power(size)))
    kernels.gather_tokens[(table.rows, parts(size, block_c), parts(table.widest, block_s))](
        v,
        coefficient,
        scale,
        table.ranks,
        table.first,
        order,
        starts,
        out,
        length,
        scale.shape[1],
        size,
        **_products(v),
        block_t=32,
        block_c=block_c,
        block_s=block_s,
        num_warps=8 if block_s == BLOCK_SLOTS else 4,
        num_stages=3,
    )


def forward(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    a: list[Tensor],
    b: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """y ``[N, S, d_out]`` and h ``[N, S, R]`` float32; see ``operators.routed_linear`` for the arguments."""
    count, length, d_in = x.shape
    slots, d_out = rows.shape[1], kernel.shape[1]
    x = x.contiguous()
    out = x.new_empty((count, length, d_out))
    h = torch.empty((count, length, slots), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, h
    with _on(x):
        table = bank_table(a, b, x.device)
        if length == 1:
            _single(x, table, "a", rows, scale, bias, out, h)
        else:
            cuts = [
                cut(count, length, slots, size, x.element_size(), False) for size in (d_in, d_out)
            ]
            z, _ = _down(x, table, "a", rows, scale, None, cuts[0])
            _up(z, table, "b", rows, scale, bias, out, cuts[1], h=h)
    out.view(-1, d_out).addmm_(x.view(-1, d_in), kernel)
    return out, h


def backward(
    dy: Tensor,
    x: Tensor,
    kernel: Tensor,
    scale: Tensor,
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    h: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    *,
    need_x: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, A ``[bank rows, d_in]`` and B transposed ``[bank rows, d_out]``.

    What is not needed is empty.
    """
    count, length, d_in = x.shape
    d_out, slots = dy.shape[2], rows.shape[1]
    x, dy = x.contiguous(), dy.contiguous()
    bank = sum(p.shape[0] for p in a)
    dx = torch.empty_like(x)
    d_a = torch.empty((bank, d_in), dtype=a[0].dtype, device=x.device)
    d_b = torch.empty((bank, d_out), dtype=a[0].dtype, device=x.device)
    d_scale = scale.new_zeros(scale.shape if need_scale else 0)
    if x.numel() == 0 or dy.numel() == 0:
        return dx.zero_(), d_scale, d_a.zero_(), d_b.zero_()
    with _on(x):
        table = bank_table(a, b, x.device)
        partial = length >= PARTIAL_LENGTH and slots <= BLOCK_SLOTS
        if length == 1:
            dz = torch.empty_like(h)
            _single(dy, table, "b", rows, scale, None, dx, dz)
        else:
            at_b, at_a = (
                cut(count, length, slots, size, x.element_size(), partial) for size in (d_out, d_in)
            )
            z, part_b = _down(dy, table, "b", rows, scale, h if partial else None, at_b)
            part_a = _up(z, table, "a", rows, scale, None, dx, at_a, x=x if partial else None)
            if partial:
                pieces = (at_a.pieces, at_b.pieces)
                _gather_parts(part_a, part_b, table, order, starts, d_a, d_b, pieces, slots)
            if need_scale or not partial:
                dz = z.sum(0)
        if not partial:
            _gather_tokens(x, dz, scale, table, order, starts, d_a)
            _gather_tokens(dy, h, scale, table, order, starts, d_b)
    if need_scale:
        d_scale = (dz * h).sum(1)
    if need_x:
        dx.view(-1, d_in).addmm_(dy.view(-1, d_out), kernel.t())
    return dx, d_scale, d_a, d_b
