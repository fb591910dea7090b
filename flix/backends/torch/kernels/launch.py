"""Launches of the Triton kernels, and the order of the products.

A forward is three launches: into the ranks, out of the ranks onto an empty output (with the bias), and the frozen
product, which adds itself to the output in its epilogue: reading the sum back there hides behind the product, where a
kernel after it would read and write the whole output once more. A backward is the same three for the transposed
maps, where the first two also leave partial gradients from the tiles they read anyway, and one that sums those.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl  # type: ignore[import-not-found,import-untyped]
from torch import Tensor

from flix.backends.torch.kernels import triton_kernels as kernels
from flix.backends.torch.kernels.tables import Table, bank_table
from flix.core.strategy.blocks import (
    Blocks,
    cut,
    cut_feature,
    cut_parts,
    cut_tokens,
    partial,
    parts,
    splits,
)

_SOURCES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
A, B = 0, 1


def _on(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _tf32() -> bool:
    """Whether torch is told to multiply float32 in TF32; the first of its two ways to say so fails after the second."""
    settings = torch.backends.cuda.matmul
    try:
        return bool(settings.allow_tf32)
    except RuntimeError:
        return bool(settings.fp32_precision == "tf32")


def _products(x: Tensor) -> dict[str, Any]:
    """How kernels multiply: float32 as torch is told to; the interpreter needs help with bfloat16."""
    return {
        "precision": "tf32" if x.dtype == torch.float32 and _tf32() else "ieee",
        "widen": x.device.type == "cpu" and x.dtype == torch.bfloat16,
    }


def _tile(blocks: Blocks) -> dict[str, int]:
    return {
        "block_t": blocks.tokens,
        "block_c": blocks.columns,
        "block_s": blocks.slots,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


class _Sum(NamedTuple):
    """A batch on a layer's bank: what its launches read, of the arguments of ``operators.routed_linear``."""

    table: Table
    rows: Tensor
    scale: Tensor

    @property
    def slots(self) -> int:
        return self.rows.shape[1]

    @property
    def source(self) -> Any:
        return _SOURCES[self.table.dtype]

    def cut(self, x: Tensor, size: int, grad: bool = False) -> Blocks:
        return cut(x.shape[0], x.shape[1], self.slots, size, x.element_size(), grad)

    def sizes(self, v: Tensor, blocks: Blocks) -> tuple[int, ...]:
        """Tokens, length, span, pieces, slots and columns, as kernels take them."""
        count, length, size = v.shape
        return count * length, length, blocks.span, blocks.pieces, self.slots, size

    def part(self, v: Tensor, blocks: Blocks) -> Tensor:
        """Room for the partial gradients of the factor that v is multiplied with."""
        shape = (v.shape[0] * blocks.pieces, self.slots, v.shape[2])
        return v.new_empty(shape, dtype=torch.float32)

    def down(
        self, v: Tensor, side: int, blocks: Blocks, h: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(z ``[chunks, N, S, R]``, the partial gradients if h is given) of v ``[N, S, size]``."""
        z = v.new_empty((blocks.chunks, *v.shape[:2], self.slots), dtype=torch.float32)
        part = z if h is None else self.part(v, blocks)
        kernels.down[(v.shape[0] * blocks.pieces, blocks.chunks, blocks.blocks)](
            v,
            self.table.at[side],
            self.rows,
            self.scale,
            z if h is None else h,
            z,
            part,
            *self.sizes(v, blocks),
            source=self.source,
            grad=h is not None,
            **_products(v),
            **_tile(blocks),
        )
        # Every column program of the next launch sums the chunks; of many, that costs more than a launch.
        return (z.sum(0, keepdim=True) if blocks.many else z), part

    def up(
        self,
        z: Tensor,
        side: int,
        bias: Tensor | None,
        out: Tensor,
        blocks: Blocks,
        *,
        h: Tensor | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """Fill ``out`` ``[N, S, size]``, and h if given; the partial gradients if x is given."""
        part = z if x is None else self.part(x, blocks)
        kernels.up[(out.shape[0] * blocks.pieces, blocks.chunks)](
            z,
            self.table.at[side],
            self.rows,
            self.scale,
            out if bias is None else bias,
            out if x is None else x,
            z if h is None else h,
            out,
            part,
            *self.sizes(out, blocks),
            chunks=z.shape[0],
            blocks=blocks.blocks,
            source=self.source,
            biased=bias is not None,
            keep=h is not None,
            grad=x is not None,
            **_products(out),
            **_tile(blocks),
        )
        return part

    def single(self, v: Tensor, into: int, bias: Tensor | None, out: Tensor, h: Tensor) -> None:
        """Fill ``out`` and h for tokens with slots of their own; ``into`` is the side multiplied first."""
        count, length, size_in = v.shape
        size_out = out.shape[2]
        blocks = cut_tokens(count * length, self.slots, size_in, size_out)
        kernels.single_tokens[(count * length, parts(size_out, blocks.span))](
            v,
            self.table.at[into],
            self.table.at[1 - into],
            self.rows,
            self.scale,
            out if bias is None else bias,
            h,
            out,
            *(length, self.slots, size_in, size_out, blocks.span),
            source=self.source,
            biased=bias is not None,
            block_i=blocks.into,
            block_o=blocks.out_of,
            block_s=blocks.slots,
            num_warps=8,
        )

    def gather_tokens(
        self, v: Tensor, coefficient: Tensor, order: Tensor, starts: Tensor, out: Tensor
    ) -> None:
        """Fill ``out``, one side's gradient, from the tokens of each feature."""
        table, (count, length, size) = self.table, v.shape
        block_s, block_c, warps = cut_feature(table.widest, size)
        shared = splits(count * length, table.rows, size)
        sums = out if shared == 1 else out.new_empty((shared, *out.shape), dtype=torch.float32)
        grid = (table.rows, parts(size, block_c), parts(table.widest, block_s) * shared)
        kernels.gather_tokens[grid](
            v,
            coefficient,
            self.scale,
            table.ranks,
            table.first,
            order,
            starts,
            sums,
            *(length, self.slots, size, table.rows, shared),
            **_products(v),
            block_t=32,
            block_c=block_c,
            block_s=block_s,
            num_warps=warps,
            num_stages=3,
        )
        if shared > 1:
            out.copy_(sums.sum(0))


def forward(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    strategy: str,
) -> tuple[Tensor, Tensor]:
    """y ``[N, S, d_out]`` and h ``[N, S, R]`` float32; see ``operators.routed_linear`` for the arguments."""
    return outputs(x, kernel, bias, scale, rows, bank_table(a, b, x.device))


def outputs(
    x: Tensor,
    kernel: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    table: Table,
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` on a bank whose table is made; without a kernel, ``base`` ``[N, S, d_out]`` is its product."""
    count, length, d_in = x.shape
    d_out = base.shape[2] if kernel is None else kernel.shape[1]  # type: ignore[union-attr]
    x = x.contiguous()
    out = x.new_empty((count, length, d_out))
    h = x.new_empty((count, length, rows.shape[1]), dtype=torch.float32)
    if out.numel() == 0:
        return out, h
    with _on(x):
        batch = _Sum(table, rows, scale)
        if length == 1:
            batch.single(x, A, bias, out, h)
        else:
            z, _ = batch.down(x, A, batch.cut(x, d_in))
            batch.up(z, B, bias, out, batch.cut(x, d_out), h=h)
    if kernel is None:
        out.add_(base)  # type: ignore[arg-type]
    else:
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
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    strategy: str,
    need_x: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, A ``[bank rows, d_in]`` and B transposed ``[bank rows, d_out]``.

    What is not needed is empty.
    """
    table = bank_table(a, b, x.device)
    d_a, d_b = (x.new_empty((table.rows, v.shape[2]), dtype=table.dtype) for v in (x, dy))
    given = dy, x, kernel, scale, rows, order, starts, h, table, (d_a, d_b), need_x, need_scale
    dx, d_scale = gradients(*given)
    return dx, scale.new_zeros(0) if d_scale is None else d_scale, d_a, d_b


def gradients(
    dy: Tensor,
    x: Tensor,
    kernel: Tensor | None,
    scale: Tensor,
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    h: Tensor,
    table: Table,
    pairs: tuple[Tensor, Tensor] | None,
    need_x: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, which has no meaning where it is not needed, and of scale, None where it is not.

    Args:
        dy, x, kernel, scale, rows, order, starts, h: as for :func:`backward`; without a kernel x gets what comes by way
            of the features.
        table: the bank's.
        pairs: where the gradients of A ``[bank rows, d_in]`` and of B transposed ``[bank rows, d_out]`` go; None if
            they are not needed.
        need_x, need_scale: what is needed.
    """
    length, d_in, d_out = x.shape[1], x.shape[2], dy.shape[2]
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    if x.numel() == 0 or dy.numel() == 0:
        for room in pairs or ():
            room.zero_()
        return dx.zero_(), torch.zeros_like(scale) if need_scale else None
    with _on(x):
        batch = _Sum(table, rows, scale)
        by_parts = pairs is not None and partial(x.shape[0], length, batch.slots, d_in + d_out)
        if length == 1:
            dz = torch.empty_like(h)
            batch.single(dy, B, None, dx, dz)
        else:
            at_b, at_a = (batch.cut(x, size, by_parts) for size in (d_out, d_in))
            z, part_b = batch.down(dy, B, at_b, h if by_parts else None)
            part_a = batch.up(z, A, None, dx, at_a, x=x if by_parts else None)
            dz = z.sum(0) if need_scale or not by_parts else z
        if by_parts:
            block_c = cut_parts(d_in, d_out)
            chunks_a = parts(d_in, block_c)
            kernels.gather_parts[(table.rows, chunks_a + parts(d_out, block_c))](
                part_a,
                part_b,
                order,
                starts,
                *pairs,  # type: ignore[misc]
                *(at_a.pieces, at_b.pieces, batch.slots, d_in, d_out, chunks_a),
                block_e=8,
                block_c=block_c,
                num_warps=4,
            )
        elif pairs is not None:
            batch.gather_tokens(x, dz, order, starts, pairs[0])
            batch.gather_tokens(dy, h, order, starts, pairs[1])
    if need_x and kernel is not None:
        dx.view(-1, d_in).addmm_(dy.view(-1, d_out), kernel.t())
    return dx, (dz * h).sum(1) if need_scale else None
