"""The strategy "fused": the routed sum by grouped Pallas kernels, which gather no rows for an example.

Three products suffice, forward and backward: shrink (into rank space, by each example's blocks of a table), expand
(out of it, onto a base), and outer (summed by feature, for the tables' gradients). With few positions to a row,
positions are first sorted by feature into tiles of one feature each, as a mixture of experts does it. Gradients are
written out (``custom_vjp``), since Pallas kernels have none of their own: reverse mode only, and once. What is kept for
them is x, the values in rank space and the batch's tables.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flix.core.errors import ConfigError
from flix.core.strategy.blocks import parts
from flix.core.strategy.tiles import TILE, positions

INTERPRET = "FLIX_PALLAS_INTERPRET"
PLATFORMS = {"gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}

# Above this rank a block no longer fits a GPU's registers well; "auto" then gathers.
WIDEST = 256


class Target(NamedTuple):
    """Which kernels run, "gpu" or "tpu", and whether they are interpreted."""

    kind: str
    interpret: bool


class Run(NamedTuple):
    """How a product runs.

    Attributes:
        rows: positions of a block; divides their number.
        wide: the dtype that products are summed in.
        interpret: whether to run without the device.
    """

    rows: int
    wide: Any
    interpret: bool

    def writing(self, name: str, dtype: Any, *shape: int) -> dict[str, Any]:
        """What Pallas is told of a program of this name that writes one such array."""
        out = jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]
        return {"out_shape": out, "interpret": self.interpret, "name": f"flix_{name}"}


def platform_of(x: Any) -> str:
    """The platform that a computation on x will run on: x's own where it is known, else the default."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return str(next(iter(x.devices())).platform)
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    if chosen is not None:
        return chosen if isinstance(chosen, str) else str(chosen.platform)
    return jax.default_backend()


def find_target(platform: str) -> Target:
    """The kernels for a platform.

    Raises:
        ConfigError: none, and interpreting is not switched on.
    """
    asked = os.environ.get(INTERPRET, "").lower()
    if asked in ("1", "gpu", "tpu"):
        return Target("tpu" if asked == "tpu" else "gpu", True)
    if asked not in ("", "0"):
        raise ConfigError(
            f"{INTERPRET} must be 1 or gpu, tpu (whose kernels to interpret), or 0; got {asked!r}"
        )
    if platform not in PLATFORMS:
        raise ConfigError(
            f"strategy 'fused' is a Pallas kernel for a GPU or TPU, but this computation runs on "
            f"{platform!r}; use 'auto', 'gather', 'masked' or 'single', or set {INTERPRET}=1 to run "
            "it interpreted (slow, for tests)"
        )
    return Target(PLATFORMS[platform], False)


def can_run() -> bool:
    """Whether the kernels run on the default platform, be it interpreted."""
    return bool(os.environ.get(INTERPRET, "0").strip("0")) or jax.default_backend() in PLATFORMS


def _kernels(target: Target) -> ModuleType:
    # Imported where used: Pallas takes its time, and a CPU needs none of it.
    return importlib.import_module(f"flix.backends.jax.kernels.{target.kind}")


def dot(a: Any, b: Any, contract: tuple[int, int], dtype: Any) -> Any:
    """The product of two matrices over one axis of each, summed in a dtype: what the kernels' programs do."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


class _Tiles(NamedTuple):
    """Positions sorted by feature, in tiles of one feature each.

    Attributes:
        place: int32 ``[T, 1]``, the feature of each tile.
        position: int32 ``[T, rows]``, the position (n, s) at each place of a tile; M where there is none.
        pair: int32 ``[T, rows]``, the (n, s, w) there; M W where there is none.
        inverse: int32 ``[M, W]``, where the tiles hold each (n, s, w).
    """

    place: Array
    position: Array
    pair: Array
    inverse: Array


def _make_tiles(place: Array, length: int, blocks: int, rows: int) -> _Tiles:
    """Sort N * S positions by the places ``[N, W]`` of their slots, all below ``blocks``."""
    width = place.shape[1]
    each = jnp.repeat(place, length, axis=0).reshape(-1)
    pairs = each.shape[0]
    order = jnp.argsort(each, stable=True).astype(jnp.int32)
    ordered = each[order]
    start = jnp.searchsorted(ordered, jnp.arange(blocks + 1))
    tiles = -(-(start[1:] - start[:-1]) // rows)  # of each feature
    ends = jnp.cumsum(tiles)
    spot = ((ends - tiles)[ordered] * rows + jnp.arange(pairs) - start[ordered]).astype(jnp.int32)
    most = parts(pairs, rows) + min(blocks, pairs)
    pair = jnp.full(most * rows, pairs, jnp.int32).at[spot].set(order, unique_indices=True)
    inverse = jnp.zeros(pairs, jnp.int32).at[order].set(spot, unique_indices=True)
    feature = jnp.searchsorted(ends, jnp.arange(most), side="right")
    return _Tiles(
        jnp.minimum(feature, blocks - 1).astype(jnp.int32)[:, None],
        (pair // width).reshape(most, rows),
        pair.reshape(most, rows),
        inverse.reshape(-1, width),
    )


def take_rows(table: Array, index: Array, axis: int = 0) -> Array:
    """Rows of a table, which are its entries along an axis; zeros where the index is beyond it."""
    return jnp.take(table, index, axis=axis, mode="fill", fill_value=0)


def _pad(array: Array, **sizes: int) -> Array:
    """The array, with zeros after its last places up to the sizes of its second last and last dimension."""
    rows = sizes.get("rows", array.shape[-2]) - array.shape[-2]
    cols = sizes.get("cols", array.shape[-1]) - array.shape[-1]
    if rows == 0 and cols == 0:
        return array
    return jnp.pad(array, [*[(0, 0)] * (array.ndim - 2), (0, rows), (0, cols)])


class _Frame(NamedTuple):
    """How the arrays of one call are laid out for the kernels; see :func:`_frame`."""

    place: Array  # of each tile or example: [T, W']
    rows: int  # positions of a block
    length: int  # positions of a tile or example, padded
    tiles: _Tiles | None  # None: an example is a tile of its own

    def spread(self, values: Array) -> Array:
        """Values ``[N, S, d]`` as the kernels take them, ``[T, S', d']``."""
        values = _pad(values, cols=parts(values.shape[-1], TILE) * TILE)
        if self.tiles is None:
            return _pad(values, rows=self.length)
        return take_rows(values.reshape(-1, values.shape[-1]), self.tiles.position)

    def factors(self, factor: Array, length: int) -> Array:
        """Factors ``[N, W]`` in rank space: ``[T, W', S' or 1, 1]``."""
        if self.tiles is None:
            return factor[:, :, None, None]
        flat = jnp.repeat(factor, length, axis=0).reshape(-1)
        return take_rows(flat, self.tiles.pair)[:, None, :, None]

    def collect(self, values: Array, base: Array | None, shape: tuple[int, ...]) -> Array:
        """The kernels' ``[T, S', d']`` as ``[N, S, d]``; tiles are summed over slots, onto the base."""
        if self.tiles is None:
            return values[:, : shape[1], : shape[2]]
        flat = values.reshape(-1, values.shape[-1])[:, : shape[2]]
        sums = flat[self.tiles.inverse].astype(jnp.promote_types(flat.dtype, jnp.float32)).sum(1)
        sums = sums.reshape(shape)
        sums = sums if base is None else base.astype(sums.dtype) + sums
        return sums.astype(values.dtype)


def _frame(shape: tuple[int, ...], place: Array, blocks: int, rank: int) -> _Frame:
    """The layout for an input of this shape ``[N, S, ...]``."""
    count, length = shape[:2]
    if length >= TILE:
        rows = positions(length, rank)
        return _Frame(place, rows, parts(length, rows) * rows, None)
    rows = positions(max(count * length * place.shape[1] // blocks, 1), rank)
    tiles = _make_tiles(place, length, blocks, rows)
    return _Frame(tiles.place, rows, rows, tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_sum(
    target: Target, base: Array, x: Array, a: Array, b: Array, factor: Array, place: Array
) -> Array:
    """base + Σ_w factor[n, w] x[n] a[place[n, w]]^T b[place[n, w]], position by position.

    Args:
        target: the kernels.
        base: ``[N, S, d_out]``.
        x: ``[N, S, d_in]``, in base's dtype; N and S positive.
        a: ``[U, R, d_in]``, R a power of two of 16 or more; the last block is zero.
        b: ``[U, R, d_out]`` likewise.
        factor: ``[N, W]``, float32 or wider, W positive.
        place: int32 ``[N, W]``, below U; U - 1 where a slot is unused.

    Returns:
        ``[N, S, d_out]`` in base's dtype. The gradient of a table is summed in factor's dtype, always in the same
        order.
    """
    return _forward(target, base, x, a, b, factor, place)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(
    target: Target, base: Array, x: Array, a: Array, b: Array, factor: Array, place: Array
) -> tuple[Array, tuple[Any, ...]]:
    kernels, dtype = _kernels(target), base.dtype
    frame = _frame(x.shape, place, a.shape[0], a.shape[1])
    run = Run(frame.rows, factor.dtype, target.interpret)
    h = kernels.shrink(frame.spread(x), _table(a, dtype), frame.place, run)
    scaled = (h * frame.factors(factor, x.shape[1])).astype(dtype)
    onto = frame.spread(base) if frame.tiles is None else None
    y = kernels.expand(onto, scaled, _table(b, dtype), frame.place, run)
    return frame.collect(y, base, base.shape), (x, h, a, b, factor, place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _backward(target: Target, saved: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    x, h, a, b, factor, place = saved
    kernels, dtype, length = _kernels(target), g.dtype, x.shape[1]
    frame = _frame(x.shape, place, a.shape[0], a.shape[1])
    run = Run(frame.rows, factor.dtype, target.interpret)
    scale, gs, xs = frame.factors(factor, length), frame.spread(g), frame.spread(x)
    back = kernels.shrink(gs, _table(b, dtype), frame.place, run)
    by_rank = (back * h).sum(-1)  # [T, W', S']
    if frame.tiles is None:
        d_factor = by_rank.sum(-1)
    else:
        d_factor = by_rank.reshape(-1)[frame.tiles.inverse]
        d_factor = d_factor.reshape(place.shape[0], length, -1).sum(1)
    back, forth = (back * scale).astype(dtype), (h * scale).astype(dtype)
    dx = kernels.expand(None, back, _table(a, dtype), frame.place, run)
    real = a.shape[0] - 1
    da = kernels.outer(back, xs, frame.place, real, run)
    db = kernels.outer(forth, gs, frame.place, real, run)
    none = np.zeros(place.shape, jax.dtypes.float0)
    return (
        g,
        frame.collect(dx, None, x.shape).astype(x.dtype),
        _gradient(da, a),
        _gradient(db, b),
        d_factor.astype(factor.dtype),
        none,
    )


def _no_second(target: Target, *_: Any) -> Any:
    raise ConfigError(
        "strategy 'fused' can be differentiated once, in reverse mode; for second derivatives or forward "
        "mode use 'gather', 'masked' or 'single'"
    )


# Without this, a second derivative would fail somewhere inside of Pallas, without a word about the cause.
_forward.defvjp(_no_second, _no_second)
_backward.defvjp(_no_second, _no_second)


def _table(table: Array, dtype: Any) -> Array:
    return _pad(table.astype(dtype), cols=parts(table.shape[-1], TILE) * TILE)


def _gradient(blocks: Array, table: Array) -> Array:
    """Sums of the features' blocks as the gradient of a table, whose last block has none."""
    blocks = blocks[:, :, : table.shape[2]].astype(table.dtype)
    return jnp.concatenate([blocks, jnp.zeros_like(table[-1:])])


fused_sum.defvjp(_forward, _backward)


@jax.custom_vjp
def with_factors_of_zero(
    y: Array, x: Array, a: Array, b: Array, factor: Array, place: Array
) -> Array:
    """y as it is, and the gradient of factors that are 0, whose slots :func:`fused_sum` was not given.

    Features with the weight 0 do not act (docs/specification.md §1.5), yet their weights have a gradient. It is made of
    rows gathered for each example, and only where weights are differentiated and some are 0.

    Args:
        y: ``[N, S, d_out]``, what :func:`fused_sum` gave.
        place: of all slots; otherwise as for :func:`fused_sum`.
    """
    return y


def _zeros_forward(y: Any, x: Any, a: Any, b: Any, factor: Any, place: Any) -> tuple[Array, Any]:
    kept = (x.value, a.value, b.value, factor.value, place.value)
    return y.value, kept if factor.perturbed else None


def _zeros_backward(kept: Any, g: Any) -> tuple[Any, ...]:
    if type(g) is jax.custom_derivatives.SymbolicZero:
        return (None,) * 6
    if kept is None:
        return (g, *(None,) * 5)
    x, a, b, factor, place = kept

    def products() -> Array:
        def of(values: Array, table: Array) -> Array:
            own = table.astype(values.dtype)[place]
            return jnp.einsum("nsd,nwrd->nwsr", values, own, preferred_element_type=factor.dtype)

        found = (of(x, a) * of(g, b)).sum((2, 3))
        return jnp.where(factor == 0, found, 0).astype(factor.dtype)

    d_factor = jax.lax.cond((factor == 0).any(), products, lambda: jnp.zeros_like(factor))
    return g, None, None, None, d_factor, None


with_factors_of_zero.defvjp(_zeros_forward, _zeros_backward, symbolic_zeros=True)
