"""The three grouped products of the fused strategy as Pallas kernels for GPUs, through Triton.

A program reads the ids it needs from memory and slices the whole table by them: Triton has no scalar prefetch. It loops
over what it sums, so every program writes a block of its own: no atomics, and two runs give the same bits. Every slice
has power-of-two sizes of 16 or more, as Triton's products want; ``fused`` pads for it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from flix.backends.jax.kernels.fused import Run, dot
from flix.core.strategy.tiles import gpu_columns

# Chosen by what fits the shared memory and registers of current cards; not tuned on one.
_PARAMS = triton.CompilerParams(num_warps=4, num_stages=2)
_SPLITS = 8


def div(a: Any, b: int) -> Any:
    """a // b of counts: int32 throughout, also where 64-bit types are on."""
    return jax.lax.div(jnp.asarray(a, jnp.int32), jnp.int32(b))


def rem(a: Any, b: int) -> Any:
    """a % b likewise."""
    return jax.lax.rem(jnp.asarray(a, jnp.int32), jnp.int32(b))


def _sum(steps: Any, step: Any, start: Any) -> Any:
    return jax.lax.fori_loop(jnp.int32(0), jnp.asarray(steps, jnp.int32), step, start)


def _whole(array: Array) -> pl.BlockSpec:
    zeros = (0,) * array.ndim
    return pl.BlockSpec(array.shape, lambda *_: zeros)


def _shrink(place: Any, x: Any, table: Any, out: Any, *, blocks: int, size: int) -> None:
    feature = place[div(pl.program_id(0), blocks), pl.program_id(1)]

    def step(k: Any, total: Any) -> Any:
        part = pl.ds(k * size, size)
        return total + dot(x[:, part], table[feature, :, part], (1, 1), out.dtype)

    out[...] = _sum(x.shape[1] // size, step, jnp.zeros(out.shape, out.dtype))


def shrink(x: Array, table: Array, place: Array, run: Run) -> Array:
    """h[n, w] = x[n] table[place[n, w]]^T: ``[N, W, S, R]`` in the wide dtype.

    Args:
        x: ``[N, S, d]``.
        table: ``[U, R, d]``, in the dtype of x.
        place: int32 ``[N, W]``, below U.
        run: how; its blocks divide S.
    """
    count, length, d = x.shape
    rows, width, rank = run.rows, place.shape[1], table.shape[1]
    blocks = length // rows
    return pl.pallas_call(  # type: ignore[no-any-return]
        functools.partial(_shrink, blocks=blocks, size=gpu_columns(d, x.dtype.itemsize)),
        **run.writing("shrink", run.wide, count, width, length, rank),
        grid=(count * blocks, width),
        in_specs=[
            _whole(place),
            pl.BlockSpec((None, rows, d), lambda i, w: (div(i, blocks), rem(i, blocks), 0)),
            _whole(table),
        ],
        out_specs=pl.BlockSpec(
            (None, None, rows, rank), lambda i, w: (div(i, blocks), w, rem(i, blocks), 0)
        ),
        compiler_params=_PARAMS,
    )(place, x, table)


def _expand(place: Any, h: Any, table: Any, *rest: Any, blocks: int, wide: Any) -> None:
    *base, out = rest
    example, size = div(pl.program_id(0), blocks), out.shape[1]
    part = pl.ds(pl.program_id(1) * size, size)

    def step(w: Any, total: Any) -> Any:
        return total + dot(h[w], table[place[example, w], :, part], (1, 0), wide)

    start = base[0][...].astype(wide) if base else jnp.zeros(out.shape, wide)
    out[...] = _sum(h.shape[0], step, start).astype(out.dtype)


def expand(base: Array | None, h: Array, table: Array, place: Array, run: Run) -> Array:
    """base[n] + Σ_w h[n, w] table[place[n, w]]: ``[N, S, d]`` in the dtype of h.

    Args:
        base: ``[N, S, d]``, or None for zeros.
        h: ``[N, W, S, R]``, in the dtype of the table.
        table, place, run: as for :func:`shrink`.
    """
    count, width, length, rank = h.shape
    rows, d, bases = run.rows, table.shape[2], [] if base is None else [base]
    blocks, size = length // rows, gpu_columns(d, 2, rank)
    tile = pl.BlockSpec((None, rows, size), lambda i, o: (div(i, blocks), rem(i, blocks), o))
    return pl.pallas_call(  # type: ignore[no-any-return]
        functools.partial(_expand, blocks=blocks, wide=run.wide),
        **run.writing("expand", h.dtype, count, length, d),
        grid=(count * blocks, d // size),
        in_specs=[
            _whole(place),
            pl.BlockSpec(
                (None, width, rows, rank), lambda i, o: (div(i, blocks), 0, rem(i, blocks), 0)
            ),
            _whole(table),
            *[tile for _ in bases],
        ],
        out_specs=tile,
        compiler_params=_PARAMS,
    )(place, h, table, *bases)


def _outer(
    order: Any, bounds: Any, h: Any, x: Any, out: Any, *, blocks: int, rows: int, pieces: int
) -> None:
    feature, part = div(pl.program_id(0), pieces), rem(pl.program_id(0), pieces)
    mine, width, size = pl.program_id(1), h.shape[1], out.shape[1]
    first = bounds[feature]
    todo = (bounds[feature + 1] - first) * blocks

    def step(i: Any, total: Any) -> Any:
        block = mine + i * _SPLITS
        pair = order[first + div(block, blocks)]
        example, at = div(pair, width), pl.ds(rem(block, blocks) * rows, rows)
        left = h[example, rem(pair, width), at, :]
        right = x[example, at, pl.ds(part * size, size)]
        return total + dot(left, right, (0, 0), out.dtype)

    steps = div(todo - mine + _SPLITS - 1, _SPLITS)
    out[...] = _sum(steps, step, jnp.zeros(out.shape, out.dtype))


def outer(h: Array, x: Array, place: Array, features: int, run: Run) -> Array:
    """Σ h[n, w]^T x[n] over the (n, w) of each feature: ``[features, R, d]`` in the wide dtype.

    Args:
        h: ``[N, W, S, R]``, in the dtype of x.
        x: ``[N, S, d]``.
        place, run: as for :func:`shrink`.
        features: sums are made for the places below this.
    """
    _, _, length, rank = h.shape
    rows, d, blocks = run.rows, x.shape[2], length // run.rows
    size = gpu_columns(d, 2, rank)
    flat = place.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(flat[order], jnp.arange(features + 1)).astype(jnp.int32)
    pieces = d // size
    # A feature that all examples share would keep one program busy alone: its blocks are dealt to several.
    parts: Array = pl.pallas_call(
        functools.partial(_outer, blocks=blocks, rows=rows, pieces=pieces),
        **run.writing("outer", run.wide, _SPLITS, features, rank, d),
        grid=(features * pieces, _SPLITS),
        in_specs=[_whole(a) for a in (order, bounds, h, x)],
        out_specs=pl.BlockSpec(
            (None, None, rank, size), lambda i, k: (k, div(i, pieces), 0, rem(i, pieces))
        ),
        compiler_params=_PARAMS,
    )(order, bounds, h, x)
    return parts.sum(0)
