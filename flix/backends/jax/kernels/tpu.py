"""The three grouped products of the fused strategy as Pallas kernels for TPUs.

The functions, their arguments and results are those of :mod:`flix.backends.jax.kernels.gpu`.

A TPU runs its grid in order, and fetches the block of a feature by an index known beforehand (scalar prefetch). So what
a GPU program loops over is the grid's last dimension here, and sums grow in a block that is visited again and again.
Blocks are whole in a dimension, or multiples of the hardware's tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jax.lax import div, rem

from flix.backends.jax.kernels.fused import Run, dot
from flix.core.strategy.tiles import tpu_columns


def _shrink(place: Any, x: Any, table: Any, out: Any) -> None:
    del place

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    out[...] += dot(x[...], table[...], (1, 1), out.dtype)


def shrink(x: Array, table: Array, place: Array, run: Run) -> Array:
    """h[n, w] = x[n] table[place[n, w]]^T: ``[N, W, S, R]``."""
    count, length, d = x.shape
    rows, width, rank, size = run.rows, place.shape[1], table.shape[1], tpu_columns(d)
    return pl.pallas_call(  # type: ignore[no-any-return]
        _shrink,
        **run.writing("shrink", run.wide, count, width, length, rank),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, length // rows, width, d // size),
            in_specs=[
                pl.BlockSpec((None, rows, size), lambda n, s, w, k, place: (n, s, k)),
                pl.BlockSpec(
                    (None, rank, size), lambda n, s, w, k, place: (place[n * width + w], 0, k)
                ),
            ],
            out_specs=pl.BlockSpec(
                (None, None, rows, rank), lambda n, s, w, k, place: (n, w, s, 0)
            ),
        ),
    )(place.reshape(-1), x, table)


def _expand(place: Any, h: Any, table: Any, *rest: Any, width: int) -> None:
    del place
    *base, out, total = rest
    slot = pl.program_id(3)

    @pl.when(slot == 0)
    def _() -> None:
        zeros = jnp.zeros(total.shape, total.dtype)
        total[...] = base[0][...].astype(total.dtype) if base else zeros

    total[...] += dot(h[...], table[...], (1, 0), total.dtype)

    @pl.when(slot == width - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def expand(base: Array | None, h: Array, table: Array, place: Array, run: Run) -> Array:
    """base[n] + Σ_w h[n, w] table[place[n, w]]: ``[N, S, d]``."""
    count, width, length, rank = h.shape
    rows, d, bases = run.rows, table.shape[2], [] if base is None else [base]
    size = tpu_columns(d)
    tile = pl.BlockSpec((None, rows, size), lambda n, s, o, w, place: (n, s, o))
    return pl.pallas_call(  # type: ignore[no-any-return]
        functools.partial(_expand, width=width),
        **run.writing("expand", h.dtype, count, length, d),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count, length // rows, d // size, width),
            in_specs=[
                pl.BlockSpec((None, None, rows, rank), lambda n, s, o, w, place: (n, w, s, 0)),
                pl.BlockSpec(
                    (None, rank, size), lambda n, s, o, w, place: (place[n * width + w], 0, o)
                ),
                *[tile for _ in bases],
            ],
            out_specs=tile,
            scratch_shapes=[tpu.VMEM((rows, size), run.wide)],
        ),
    )(place.reshape(-1), h, table, *bases)


def _outer(order: Any, place: Any, h: Any, x: Any, out: Any) -> None:
    del order
    entry = pl.program_id(1)
    fresh = (entry == 0) | (place[entry] != place[jnp.maximum(entry - 1, 0)])

    @pl.when(fresh & (pl.program_id(2) == 0))
    def _() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    out[...] += dot(h[...], x[...], (0, 0), out.dtype)


def outer(h: Array, x: Array, place: Array, features: int, run: Run) -> Array:
    """Σ h[n, w]^T x[n] over the (n, w) of each feature: ``[features, R, d]``."""
    _, width, length, rank = h.shape
    rows, d, flat = run.rows, x.shape[2], place.reshape(-1)
    size = tpu_columns(d)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    # Entries sorted by feature: each block of the result is visited in one stretch. Places beyond the features
    # share one block more.
    ordered = jnp.minimum(flat[order], features)
    sums: Array = pl.pallas_call(
        _outer,
        **run.writing("outer", run.wide, features + 1, rank, d),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(d // size, flat.shape[0], length // rows),
            in_specs=[
                pl.BlockSpec(
                    (None, None, rows, rank),
                    lambda o, e, s, order, place: (
                        div(order[e], np.int32(width)),
                        rem(order[e], np.int32(width)),
                        s,
                        0,
                    ),
                ),
                pl.BlockSpec(
                    (None, rows, size),
                    lambda o, e, s, order, place: (div(order[e], np.int32(width)), s, o),
                ),
            ],
            out_specs=pl.BlockSpec(
                (None, rank, size), lambda o, e, s, order, place: (place[e], 0, o)
            ),
        ),
    )(order, ordered, h, x)
    # A block that no entry visits is never written.
    visited = (flat[:, None] == jnp.arange(features)).any(0)
    return jnp.where(visited[:, None, None], sums[:features], 0)
