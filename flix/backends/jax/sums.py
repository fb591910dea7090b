"""The routed sum in plain differentiable array operations, in interchangeable strategies. Pure; traced ids welcome.

Every strategy reads rows of a packed table (A ``[K, d_in]``, B ``[K, d_out]``): the whole bank's (K = P), or those
of the batch's features (K = U * R). Nothing of size ``[d_out, d_in]`` is made for an example.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from numpy.typing import NDArray

from flix.backends.jax.kernels import fused
from flix.backends.jax.parameters import LayerSpec
from flix.core.strategy.decide import decide, facts_of
from flix.core.strategy.tiles import padded_rank

_BATCH, _LENGTH = 16, 64


def wide(dtype: Any) -> Any:
    """The dtype that rank-space values are kept in: float32, float64 for float64."""
    return jnp.dtype(jnp.promote_types(dtype, jnp.float32))


def at_most(size: int, limit: int) -> int:
    """The smaller of a size and a limit; the limit for a symbolic size (``jax.export``), which may be any."""
    return min(size, limit) if isinstance(size, int) else limit


def touched(ids: Array, features: int, size: int | None = None) -> Array:
    """The features of a batch, ascending, padded with the number of features: int32 ``[size]``."""
    size = at_most(ids.size, features) if size is None else size
    flat = jnp.where(ids < 0, features, ids).ravel().astype(jnp.int32)
    if size == 0 or ids.size == 0:
        return jnp.full((size,), features, jnp.int32)
    # One place more, as padding counts as a value of its own; sorted, it stands last.
    found: Array = jnp.unique(flat, size=size + 1, fill_value=features)[:size]
    return found


def row_index(spec: LayerSpec, present: Array, height: int | None = None) -> Array:
    """Where the rows of the present features stand in the bank: int32 ``[U * R]``, P where there is no row.

    With a height, blocks of so many rows instead of R, and one block more without any row.
    """
    if height is not None:
        present = jnp.append(jnp.asarray(present), len(spec.ranks))
    j = np.arange(spec.widest if height is None else height, dtype=np.int32)
    rank = jnp.take(spec.ranks, present, mode="fill", fill_value=0)
    start = jnp.take(spec.starts, present, mode="fill", fill_value=0)
    return jnp.where(j < rank[:, None], start[:, None] + j, spec.rows).reshape(-1)


def _misplaced(ids: Array, spec: LayerSpec, present: Array | None) -> tuple[Array, Array]:
    """Each id's place among the features at hand, and which ids have none although they should."""
    bad = (ids < -1) | (ids >= len(spec.ranks))
    if len(spec.removed):
        bad |= (ids[..., None] == spec.removed).any(-1)
    if present is None:
        return ids, bad
    place = jnp.searchsorted(present, ids).astype(jnp.int32)
    found = jnp.take(present, place, mode="fill", fill_value=-1) == ids
    return place, bad | ((ids >= 0) & ~found)


def poisoned(y: Array, spec: LayerSpec, ids: Array, present: Array | None) -> Array:
    """The output ``[N, ..., d_out]`` of a layer without rows: NaN for an id of no feature, or of a removed one."""
    bad = _misplaced(ids, spec, present)[1].any(-1)
    return jnp.where(bad.reshape(-1, *[1] * (y.ndim - 1)), jnp.nan, y)


def _poison(scale: Array, bad: Array) -> Array:
    """Traced ids cannot be refused: a row with one of no feature, or a removed one, becomes NaN, never the base."""
    return jnp.where(bad.any(-1)[..., None], jnp.nan, scale)


def _factors(
    spec: LayerSpec, ids: Array, weights: Array | None, dtype: Any
) -> tuple[Array, Array, Array]:
    """(ids, ranks, factors w s) of each id, both 0 where it is of no feature; ids there are the number of features."""
    known = jnp.where(ids < 0, len(spec.ranks), ids)
    rank = jnp.take(spec.ranks, known, mode="fill", fill_value=0)
    factor = jnp.take(spec.scales.astype(dtype), known, mode="fill", fill_value=0)
    return known, rank, factor if weights is None else factor * weights.astype(dtype)


def make_slots(
    spec: LayerSpec, ids: Array, weights: Array | None, present: Array | None, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """The table rows of each example, int32 ``[N, R]`` (K or more where unused), and their factors ``[N, R]``.

    Args:
        ids: integer ``[N, W]``.
        weights: ``[N, W]``, or None.
        present: the features whose rows the table holds, or None for the whole bank.
        dtype: of the factors; a wide one.
    """
    place, bad = _misplaced(ids, spec, present)
    known, rank, factor = _factors(spec, ids, weights, dtype)
    if present is None:
        start = jnp.take(spec.starts, known, mode="fill", fill_value=0)
        end = spec.rows
    else:
        start = place * spec.widest
        end = present.shape[0] * spec.widest
    width = ids.shape[-1]
    bound = spec.layout.most(width)
    if bound <= 0.8 * width * spec.widest:
        rows, scale = _compact(ids, rank, start, factor, bound, end)
    else:
        j = np.arange(spec.widest, dtype=np.int32)
        used = j < rank[..., None]
        shape = (*ids.shape[:-1], width * spec.widest)
        rows = jnp.where(used, start[..., None] + j, end).reshape(shape)
        scale = jnp.where(used, factor[..., None], 0).reshape(shape)
    return rows, _poison(scale, bad)


def _compact(
    ids: Array, rank: Array, start: Array, factor: Array, bound: int, end: int
) -> tuple[Array, Array]:
    """Slots without gaps, for unequal ranks: at most ``bound``, the sum of the W largest ranks.

    A feature listed twice takes one block of slots, with the sum of its factors, so that the bound holds.
    """
    width = ids.shape[-1]
    same = (ids[..., :, None] == ids[..., None, :]) & (ids[..., None, :] >= 0)
    earlier = same & np.tri(width, width, -1, dtype=bool)
    factor = jnp.where(same, factor[..., None, :], 0).sum(-1)
    rank = jnp.where(earlier.any(-1), 0, rank)
    ends = jnp.cumsum(rank, -1)
    column = np.arange(bound, dtype=np.int32)
    entry = (ends[..., None, :] <= column[:, None]).sum(-1)  # [N, bound]; W where no id is left
    first = jnp.take_along_axis(ends - rank, jnp.minimum(entry, width - 1), -1)
    base = jnp.take_along_axis(start, jnp.minimum(entry, width - 1), -1)
    scale = jnp.take_along_axis(factor, jnp.minimum(entry, width - 1), -1)
    used = entry < width
    return jnp.where(used, base + column - first, end), jnp.where(used, scale, 0)


def make_mask(
    spec: LayerSpec, ids: Array, weights: Array | None, present: Array | None, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Each example's factor for every table row, and which rows are its own: ``[N, K]`` both.

    Arguments as for :func:`make_slots`.
    """
    features = np.arange(len(spec.ranks), dtype=np.int32) if present is None else present
    hit = (ids[..., None] == features) & (ids[..., None] >= 0)
    one = jnp.ones((), dtype) if weights is None else weights[..., None]
    weight = jnp.where(hit, one, 0).sum(-2)  # [N, U]
    own = hit.any(-2)
    if present is None:
        factor = weight[..., spec.owners] * spec.scales.astype(dtype)[spec.owners]
        return factor, own[..., spec.owners]
    j = np.arange(spec.widest, dtype=np.int32)
    rank = jnp.take(spec.ranks, present, mode="fill", fill_value=0)
    scale = jnp.take(spec.scales.astype(dtype), present, mode="fill", fill_value=0)
    used = j < rank[:, None]
    shape = (*ids.shape[:-1], -1)
    factor = (weight[..., None] * jnp.where(used, scale[:, None], 0)).reshape(shape)
    return factor, (own[..., None] & used).reshape(shape)


def _isolated(table: Array) -> tuple[Array, Array]:
    """A table without its rows that are not all finite, and which these are: ``[K]``.

    A product over all rows would bring 0 times NaN to examples that have nothing to do with them
    (docs/specification.md §1.5).
    """
    broken = ~jnp.isfinite(table).all(-1)
    return jnp.where(broken[:, None], 0, table), broken


def _left_out(g: Any, _: Any) -> tuple[Any]:
    return (g if type(g) is ad.Zero else jnp.where(jnp.isfinite(g), g, 0),)


# The values; on the way back, what is not finite is left out. A primitive, since custom_vjp would forbid jvp.
_finite_gradients = Primitive("flix_finite_gradients")  # type: ignore[no-untyped-call]
_finite_gradients.def_impl(lambda y: y)  # type: ignore[no-untyped-call]
_finite_gradients.def_abstract_eval(lambda y: y)  # type: ignore[no-untyped-call]
mlir.register_lowering(_finite_gradients, lambda _, y: [y])
batching.defvectorized(_finite_gradients)  # type: ignore[no-untyped-call]
ad.deflinear2(_finite_gradients, _left_out)  # type: ignore[no-untyped-call]


def _quiet(values: Array, off: Array | None) -> Array:
    """Values of slots, without what is not finite where a slot's factor is 0, there and on the way back.

    Such a slot adds nothing and sends nothing back, whatever it holds; its factor has a gradient all the same.

    Args:
        off: which, in a shape that fits the values; None for none.
    """
    if off is None:
        return values
    kept = jnp.where(jnp.isfinite(values), values, 0)
    return jnp.where(off, _finite_gradients.bind(kept), values)  # type: ignore[no-untyped-call]


def frozen_stopped(
    spec: LayerSpec, a: Array, b: Array, present: Array | None
) -> tuple[Array, Array]:
    """The tables, with no gradient to the rows of frozen features."""
    if not spec.frozen:
        return a, b
    if present is None:
        trains = jnp.asarray(spec.trainable[spec.owners])
    else:
        each = jnp.take(spec.trainable, present, mode="fill", fill_value=False)
        trains = jnp.repeat(each, spec.widest, total_repeat_length=a.shape[0])
    stop = jax.lax.stop_gradient
    return tuple(jnp.where(trains[:, None], t, stop(t)) for t in (a, b))  # type: ignore[return-value]


def strategy_for(
    asked: str, spec: LayerSpec, count: int, length: int, width: int, accelerated: bool = False
) -> str:
    """The strategy to run, from shapes alone.

    Args:
        asked: ``"auto"`` to choose.
        spec: the layer's.
        count, length, width: rows of the routing, positions that share one, and ids of one.
        accelerated: whether the fused kernels suit the device, the dtype and the arrays' placement.
    """
    if spec.shape.kind == "embedding":
        accelerated = False  # looked up, not multiplied: there is no product to fuse
        asked = "gather" if asked == "fused" else asked
    # Sizes that are symbolic (jax.export) are taken for middling ones.
    count = count if isinstance(count, int) else _BATCH
    length = length if isinstance(length, int) else _LENGTH
    # One composition for all is two plain products, which XLA does best.
    suits = accelerated and spec.widest <= fused.WIDEST and count > 1
    # What is asked for finds its kernels, or says why not, by itself.
    lacks = None if suits or asked == "fused" else "arrays that the kernels suit"
    device = f"jax-{jax.default_backend()}"
    return decide(asked, facts_of(spec.layout, width, count, length, device, lacks=lacks)).strategy


def add_fused(
    spec: LayerSpec,
    y: Array,
    x: Array,
    a: Array,
    b: Array,
    ids: Array,
    weights: Array | None,
    present: Array | None,
    target: fused.Target,
) -> Array:
    """y plus the routed sum of a linear layer, by the kernels of :mod:`fused`: ``[N, S, d_out]``.

    Args:
        y: ``[N, S, d_out]``.
        target: which kernels.
        spec, x, a, b, ids, weights, present: as for :func:`routed_sum`; x in y's dtype.
    """
    space = wide(y.dtype)
    a, b = frozen_stopped(spec, a, b, present)
    if present is None:
        features = len(spec.ranks)
        # Features that no row activates cost room, not time; to leave them out pays where there are many.
        every = jnp.arange(features, dtype=jnp.int32)
        present = every if at_most(ids.size, features) == features else touched(ids, features)
        index = row_index(spec, present, padded_rank(spec.widest))
    else:
        index = jnp.asarray(_placed_rows(spec, present.shape[0], padded_rank(spec.widest)))
    place, bad = _misplaced(ids, spec, present)
    _, rank, factor = _factors(spec, ids, weights, space)
    place = jnp.where((rank > 0) & ~bad, place, present.shape[0]).astype(jnp.int32)
    tables = [
        fused.take_rows(table, index).reshape(present.shape[0] + 1, -1, table.shape[1])
        for table in (a, b)
    ]
    factor = _poison(factor, bad)
    if weights is None:
        return fused.fused_sum(target, y, x, *tables, factor, place)  # type: ignore[no-any-return]
    acting = jnp.where(factor == 0, present.shape[0], place)
    total = fused.fused_sum(target, y, x, *tables, factor, acting)
    return fused.with_factors_of_zero(total, x, *tables, factor, place)  # type: ignore[no-any-return]


def _placed_rows(spec: LayerSpec, count: int, height: int) -> NDArray[np.int32]:
    """Which gathered rows make up blocks of this height, one for each of ``count`` features and one that is zero."""
    j = np.arange(height, dtype=np.int32)
    start = np.arange(count, dtype=np.int32)[:, None] * spec.widest
    index = np.where(j < spec.widest, start + j, count * spec.widest)
    return np.append(index, np.full(height, count * spec.widest, np.int32)).astype(np.int32)


def routed_sum(
    spec: LayerSpec,
    x: Array,
    a: Array,
    b: Array,
    ids: Array,
    weights: Array | None,
    present: Array | None,
    strategy: str,
    dtype: jnp.dtype,
) -> Array:
    """Σ_f w_f s_f B_f A_f x of every example: ``[N, S, d_out]``.

    Args:
        spec: the layer's; it has at least one row.
        x: ``[N, S, d_in]``, or token ids ``[N, S]`` for an embedding.
        a: ``[K, d_in]``.
        b: ``[K, d_out]``.
        ids: integer ``[N, W]``, W and N positive.
        weights: ``[N, W]`` or None.
        present: the features whose rows the tables hold (see :func:`touched`), or None for the whole bank.
        strategy: ``"gather"``, ``"masked"`` or ``"single"``.
        dtype: of the products and the result; rank-space values are scaled in float32 or wider.
    """
    count, width = ids.shape
    space = wide(dtype)
    weights = None if weights is None else weights.astype(space)
    a, b = frozen_stopped(spec, a, b, present)
    union = at_most(count * width, len(spec.ranks))
    if strategy == "masked":
        if present is None and union * spec.widest < spec.rows:
            present = touched(ids, len(spec.ranks))
            index = row_index(spec, present)
            a, b = fused.take_rows(a, index), fused.take_rows(b, index)
        return _masked_sum(spec, x, a, b, ids, weights, present, dtype)
    rows, factor = make_slots(spec, ids, weights, present, space)
    off = each = None
    if weights is not None:
        off = factor == 0
        each = (off if strategy == "gather" else off.all(0))[..., None]
        off = off[:, None, :]
    if strategy == "single":
        rows = rows[0]
    b = _quiet(fused.take_rows(b, rows).astype(dtype), each)
    if spec.shape.kind == "embedding":
        h = _looked_up(a, x, rows)
    else:
        a = _quiet(fused.take_rows(a, rows).astype(dtype), each)
        form = "nsd,nrd->nsr" if strategy == "gather" else "nsd,rd->nsr"
        h = jnp.einsum(form, x, a, preferred_element_type=space)
    h = (_quiet(h.astype(space), off) * factor[:, None, :]).astype(dtype)
    return jnp.einsum("nsr,nro->nso" if strategy == "gather" else "nsr,ro->nso", h, b)


def _masked_sum(
    spec: LayerSpec,
    x: Array,
    a: Array,
    b: Array,
    ids: Array,
    weights: Array | None,
    present: Array | None,
    dtype: jnp.dtype,
) -> Array:
    """:func:`routed_sum` by one product with all rows of the tables, of which each example keeps its own.

    What is not finite, in a feature or an example, is taken out of the products and put into its own examples' outputs.
    """
    space = wide(dtype)
    factor, own = make_mask(spec, ids, weights, present, space)
    off = None if weights is None else factor == 0
    acting = own if off is None else own & ~off
    b, broken = _isolated(b.astype(dtype))
    if spec.shape.kind == "embedding":
        h = _looked_up(a, x, None)
    else:
        a, other = _isolated(a.astype(dtype))
        broken |= other
        x = jnp.where(jnp.isfinite(x).all(-1, keepdims=True), x, 0)  # the base's output tells
        h = jnp.einsum("nsd,rd->nsr", x, a, preferred_element_type=space)
    h = _quiet(h.astype(space), None if off is None else off[:, None, :]) * factor[:, None, :]
    h = jnp.where(own[:, None, :], h, 0).astype(dtype)
    y: Array = _finite_gradients.bind(jnp.einsum("nsr,ro->nso", h, b))  # type: ignore[no-untyped-call]
    lost = _misplaced(ids, spec, present)[1].any(-1) | (acting & broken).any(-1)
    # Added, not chosen: a choice would keep an array of the output's size for the backward.
    return y + jnp.where(lost, jnp.nan, 0).astype(y.dtype)[:, None, None]


def _looked_up(a: Array, tokens: Array, rows: Array | None) -> Array:
    """Entries of A at (row, token): ``[N, S, R]``, for rows ``[N, R]``, ``[R]``, or None for all."""
    if rows is None:
        return jnp.moveaxis(jnp.take(a, tokens, axis=1), 0, -1)
    rows = rows[:, None, :] if rows.ndim == 2 else rows
    return a.at[rows, tokens[..., None]].get(mode="fill", fill_value=0)
