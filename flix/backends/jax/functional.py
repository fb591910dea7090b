"""The pure functional core: routed layers over a bank, for any JAX program (docs/specification.md §5.3).

    bank = init(config, {"layers.0.q": (768, 768)})
    y = linear(x, kernel, bank["layers.0.q"], ids, weights)

Differentiating with respect to the bank gives gradients as large as the bank, zero for absent features. Where many
features are registered, differentiate with respect to the batch's rows instead; the cost is then what the batch uses::

    present = touched(ids, len(config.registry))
    rows = gather(bank, present)
    grads = jax.grad(lambda rows: loss(linear_rows(x, kernel, rows["layers.0.q"], ids, present)))(rows)
    bank, state = sparse_update(tx, grads, state, bank, present)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flix.backends import messages
from flix.backends.jax import quantised, sums
from flix.backends.jax.finite import name_broken
from flix.backends.jax.kernels import fused
from flix.backends.jax.parameters import Bank, LayerBank, LayerRows, LayerSpec, Rows
from flix.backends.jax.quantised import Kernel
from flix.backends.jax.routing import ActiveRouting, is_traced, leading_shape, make_routing
from flix.backends.jax.sharding import left_to_compiler, partitioned
from flix.core.checks import rate
from flix.core.errors import ConfigError, RoutingError, TargetError
from flix.core.strategy.decide import check_strategy


def linear(
    x: Array,
    kernel: Kernel,
    layer: LayerBank,
    ids: Any,
    weights: Any = None,
    *,
    bias: Array | None = None,
    strategy: str = "auto",
    lora_dropout: float = 0.0,
    key: Array | None = None,
) -> Array:
    """x W + b, plus each row's own sum of low-rank updates (docs/specification.md §1.1).

    Args:
        x: ``[B, ..., d_in]``; under ``vmap`` over rows ``[S, d_in]`` or ``[d_in]``.
        kernel: ``[d_in, d_out]``; a quantised kernel is ``{"kernel": integers, "scale": floats}``, or a function that
            returns ``[B, ..., d_out]`` for x (:mod:`flix.backends.jax.quantised`).
        layer: the layer's bank.
        ids: int ``[B, W]`` or ``[B, T, W]`` (per token); under ``vmap`` over rows ``[W]``.
        weights: float in the shape of ids; default 1.
        bias: ``[d_out]`` or None.
        strategy: ``"auto"`` (from shapes and the device alone), ``"gather"``, ``"masked"``, ``"single"``, or
            ``"fused"``, Pallas kernels for a GPU or TPU (embeddings gather).
        lora_dropout: the probability that an entry of x is hidden from the features: ``config.lora_dropout`` in
            training, 0 otherwise.
        key: a key of ``jax.random`` for the mask, one for each layer and step; needed if the rate is not 0.

    Returns:
        ``[B, ..., d_out]``, in the dtype of x W.

    Raises:
        RoutingError: routing that breaks a rule or does not fit x.
        TargetError: a kernel of other sizes than the layer.
        ConfigError: an unknown strategy, "single" for rows known to differ, "fused" on a CPU, or a rate without a key.
    """
    routing = _routing("linear", layer, LayerBank, ids, weights)
    return _linear(x, kernel, layer, routing, bias, strategy, lora_dropout, key)


def linear_rows(
    x: Array,
    kernel: Kernel,
    rows: LayerRows,
    ids: Any,
    present: Array,
    weights: Any = None,
    *,
    bias: Array | None = None,
    strategy: str = "auto",
    lora_dropout: float = 0.0,
    key: Array | None = None,
) -> Array:
    """:func:`linear` over rows from :func:`gather`; ``present`` says to which features they belong.

    An id that is not among ``present`` gives NaN in its row.
    """
    routing = _routing("linear_rows", rows, LayerRows, ids, weights, present)
    return _linear(x, kernel, rows, routing, bias, strategy, lora_dropout, key)


def embed(
    tokens: Array,
    table: Kernel,
    layer: LayerBank,
    ids: Any,
    weights: Any = None,
    *,
    strategy: str = "auto",
) -> Array:
    """E0[t], plus each row's own sum: ``E0[t] + Σ w s B_f A_f[:, t]`` (docs/specification.md §1.1).

    Args:
        tokens: int ``[B, ...]``.
        table: ``[vocabulary, d_out]``, or as :func:`linear` takes a quantised kernel.
        layer: the bank of a layer of kind "embedding".
        ids, weights, strategy: as for :func:`linear`, with the same errors.

    Returns:
        ``[B, ..., d_out]``.
    """
    return _embed(tokens, table, layer, _routing("embed", layer, LayerBank, ids, weights), strategy)


def embed_rows(
    tokens: Array,
    table: Kernel,
    rows: LayerRows,
    ids: Any,
    present: Array,
    weights: Any = None,
    *,
    strategy: str = "auto",
) -> Array:
    """:func:`embed` over rows from :func:`gather`."""
    routing = _routing("embed_rows", rows, LayerRows, ids, weights, present)
    return _embed(tokens, table, rows, routing, strategy)


def _routing(
    what: str, layer: Any, kind: type[Any], ids: Any, weights: Any, present: Array | None = None
) -> ActiveRouting:
    if not isinstance(layer, kind):
        raise TargetError(
            f"{what} takes one layer's {kind.__name__} (bank['layers.0.q']), got "
            f"{type(layer).__name__}"
        )
    return make_routing(layer.spec.registry, ids, weights, present=present)


def _linear(
    x: Array,
    kernel: Kernel,
    layer: Any,
    routing: ActiveRouting,
    bias: Array | None,
    strategy: str,
    lora_dropout: float,
    key: Array | None,
) -> Array:
    shape = layer.spec.shape
    own = _sizes(kernel, layer)
    if own not in (None, (shape.d_in, shape.d_out)) or x.shape[-1:] != (shape.d_in,):
        raise TargetError(
            f"layer {layer.spec.path!r} maps {shape.d_in} -> {shape.d_out}, but the kernel is "
            f"{'a function' if own is None else list(own)} (wanted [d_in, d_out]) and x is {list(x.shape)}"
        )
    y = quantised.product(x, kernel, layer.spec.path, shape.d_out)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    if lora_dropout := rate(lora_dropout, "lora_dropout", below_one=True):
        if key is None:
            raise ConfigError(
                f"lora_dropout={lora_dropout:g} draws a mask and needs key=, a key of "
                f"jax.random; leave out both in evaluation"
            )
        x = dropped(x, lora_dropout, key)
    return _add(y, x, layer, routing, strategy)


def _sizes(kernel: Kernel, layer: Any) -> tuple[int, ...] | None:
    """The shape of a kernel; None of a function."""
    values = quantised.values_of(kernel, layer.spec.path)
    return None if values is None else tuple(values.shape)


def _embed(
    tokens: Array, table: Kernel, layer: Any, routing: ActiveRouting, strategy: str
) -> Array:
    shape = layer.spec.shape
    own = _sizes(table, layer)
    if shape.kind != "embedding" or own not in (None, (shape.d_in, shape.d_out)):
        raise TargetError(
            f"layer {layer.spec.path!r} is {shape.kind} {shape.d_in} -> {shape.d_out}, but the table "
            f"is {'a function' if own is None else list(own)}; an embedding's sizes are (vocabulary, d_out, 'embedding')"
        )
    tokens = jnp.asarray(tokens)
    y = quantised.lookup(tokens, table, layer.spec.path, shape.d_out)
    return _add(y, tokens, layer, routing, strategy)


def _add(y: Array, x: Array, layer: Any, routing: ActiveRouting, strategy: str) -> Array:
    if isinstance(layer, LayerBank):
        name_broken(layer.spec, layer.A, layer.B, routing.ids)
    return add_update(y, x, layer.spec, layer.A, layer.B, routing, strategy)


def dropped(x: Array, rate: float, key: Array) -> Array:
    """x without the entries that a mask hides, the others divided by (1 - rate)."""
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


def add_update(
    y: Array, x: Array, spec: LayerSpec, a: Array, b: Array, routing: ActiveRouting, strategy: str
) -> Array:
    """The base's output plus the routed sum; the base's where there is nothing to add.

    Args:
        y: ``[..., d_out]``.
        x: ``[..., d_in]``, or the tokens ``[...]`` of an embedding.
        spec, a, b: the layer's.
        routing: the routing in force.
        strategy: as for :func:`linear`.
    """
    check_strategy(strategy)
    if strategy == "single" and routing.unlike is not None:
        raise messages.rows_differ(routing.unlike)
    trailing = 0 if spec.shape.kind == "embedding" else 1
    given, count, length = leading_shape(x, routing, trailing, spec.path)
    width = routing.ids.shape[-1]
    y = jnp.broadcast_to(y, (*given, y.shape[-1]))
    if 0 in x.shape or 0 in given or width == 0:
        return y
    if spec.rows == 0 and not is_traced(routing.ids):
        return y  # known ids were checked when they became a routing
    platform = fused.platform_of(x)
    accelerated = (
        platform in fused.PLATFORMS and y.dtype != jnp.float64 and not partitioned(y, x, a, b)
    )
    strategy = sums.strategy_for(strategy, spec, count, length, width, accelerated)
    target = fused.find_target(platform) if strategy == "fused" else None

    def update(
        y: Array, x: Array, a: Array, b: Array, ids: Array, weights: Any, present: Any
    ) -> Array:
        own = x.shape[x.ndim - trailing :]
        x = jnp.broadcast_to(x, (*given, *own)).reshape(count, length, *own)
        x = x.astype(y.dtype) if trailing else x
        flat = y.reshape(count, length, y.shape[-1])
        ids = ids.reshape(count, width)
        weights = None if weights is None else weights.reshape(count, width)
        if spec.rows == 0:
            total = sums.poisoned(flat, spec, ids, present)
        elif target is not None:
            total = sums.add_fused(spec, flat, x, a, b, ids, weights, present, target)
        else:
            total = flat + sums.routed_sum(spec, x, a, b, ids, weights, present, strategy, y.dtype)
        return total.reshape(y.shape)

    return left_to_compiler(  # type: ignore[no-any-return]
        update, y, y, x, a, b, routing.ids, routing.weights, routing.present
    )


def touched(ids: Any, features: int, size: int | None = None) -> Array:
    """The features that a batch activates, in ascending order; unused places contain ``features``.

    Args:
        ids: int ids of any shape; negative ones are padding.
        features: the number of registered features, ``len(config.registry)``.
        size: the length of the result; default: enough for any such ids, ``min(ids.size, features)``. For per-token
            ids you can pass a smaller size if the ids are known (on the host, before the compiled step).

    Returns:
        int32 ``[size]``.

    Raises:
        RoutingError: more features than ``size``, or a small size for traced ids.
    """
    ids = ids if is_traced(ids) else np.asarray(ids)
    safe = sums.at_most(ids.size, features)
    if size is not None and size < safe and is_traced(ids):
        raise RoutingError(
            f"touched: size {size} may be too small for traced ids {list(ids.shape)} (up to {safe} "
            "features); call it outside the compiled function, and pass the result in"
        )
    if is_traced(ids):
        return left_to_compiler(lambda ids: sums.touched(ids, features, size), None, ids)  # type: ignore[no-any-return]
    found = np.unique(ids[ids >= 0])
    size = safe if size is None else size
    if len(found) > size:
        raise RoutingError(f"touched: the batch activates {len(found)} features, size is {size}")
    return jnp.asarray(np.pad(found, (0, size - len(found)), constant_values=features), jnp.int32)


def gather(bank: Bank, present: Array) -> Rows:
    """The rows of some features in a bank, as a pytree for differentiation.

    Args:
        bank: ``{path: LayerBank}``.
        present: ids of features in ascending order, as :func:`touched` returns them.

    Returns:
        ``{path: LayerRows}``.
    """
    rows = {}
    for path, layer in bank.items():
        index = sums.row_index(layer.spec, present)
        a, b = (pick_rows(table, index, table.ndim - 2) for table in (layer.A, layer.B))
        rows[path] = LayerRows(a, b, layer.spec)
    return rows


def scatter(bank: Bank, rows: Rows, present: Array) -> Bank:
    """The bank with these rows in place of its own; every other row keeps its bits.

    Args:
        bank: ``{path: LayerBank}``.
        rows: ``{path: LayerRows}``, of these layers or some of them.
        present: as for :func:`gather`.
    """
    changed = dict(bank)
    for path, part in rows.items():
        layer = bank[path]
        index = sums.row_index(layer.spec, present)
        tables = ((layer.A, part.A), (layer.B, part.B))
        a, b = (put_rows(table, index, own, table.ndim - 2) for table, own in tables)
        changed[path] = LayerBank(a, b, layer.spec)
    return changed


def pick_rows(table: Array, index: Array, axis: int = 0) -> Array:
    """Rows of a table, which are its entries along an axis; zeros for an index beyond it."""

    def pick(table: Array, index: Array) -> Array:
        return fused.take_rows(table, index, axis)

    return left_to_compiler(pick, table, table, index)  # type: ignore[no-any-return]


def put_rows(table: Array, index: Array, rows: Array, axis: int = 0) -> Array:
    """A table with some rows replaced; an index beyond it is dropped."""

    def put(table: Array, index: Array, rows: Array) -> Array:
        place = table.at[(*[slice(None)] * axis, index)]
        return place.set(rows.astype(table.dtype), mode="drop")

    return left_to_compiler(put, table, table, index, rows)  # type: ignore[no-any-return]
