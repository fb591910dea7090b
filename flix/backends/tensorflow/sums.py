"""The routed sum in interchangeable strategies, in plain differentiable operations.

A layer keeps A of all features in one table ``[1 + rows, d_in]`` and B, transposed, in another ``[1 + rows, d_out]``;
row 0 of each is zero and stands for unused slots. Only rows in use are gathered, so forward and backward cost the
same however many features are registered, and gradients are ``tf.IndexedSlices`` over the rows in use. Nothing of
size ``[d_out, d_in]`` is made for an example.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from flix.backends.tensorflow.parameters import Live
from flix.backends.tensorflow.routing import Placed


def fetch(table: Any, rows: Any, live: Live, dtype: Any) -> Any:
    """Rows of a table; rows that do not train get no gradient, not even a zero one.

    Args:
        table: ``[T, d]``, a variable.
        rows: int32, any shape.
        live: which rows train.
        dtype: of the result.

    Returns:
        ``[*rows.shape, d]``.
    """
    values = tf.gather(table, rows)
    if live is not None:
        trains = tf.gather(live, rows)
        moving = tf.gather(table, tf.where(trains, rows, 0))
        moving = (moving - tf.stop_gradient(moving)) * tf.cast(trains, moving.dtype)[..., None]
        values = tf.stop_gradient(values) + moving
    return tf.cast(values, dtype)


def _gathered_sum(x: Any, base: Any, a: Any, b: Any, scale: Any) -> Any:
    """base ``[N, S, d_out]`` + each example's product with its own rows, A ``[N, R, d_in]`` and B ``[N, R, d_out]``."""
    h = tf.matmul(x, a, transpose_b=True) * scale[:, None, :]
    return base + tf.matmul(h, b)


# The rows are gathered outside, so that gradients of the tables stay sparse; XLA fuses the rest, forward and backward.
_compiled_sum = tf.function(_gathered_sum, jit_compile=True, reduce_retracing=True)


def _shared_rows(placed: Placed, strategy: str, scale: Any) -> tuple[Any, Any]:
    """Rows that serve the whole batch, ``[U]``, and each example's factors for them, ``[N, 1, U]``."""
    if strategy == "single":
        # All rows alike; each keeps its own factors, so that its weights get their own gradient.
        return tf.reshape(placed.rows[:1], [-1]), scale[:, None, :]
    return placed.union[0], tf.cast(placed.mask, scale.dtype)[:, None, :]


def _summed(base: Any, h: Any, rows: Any, b: Any) -> Any:
    """base ``[N, S, d_out]`` plus h ``[N, S, U]`` times b ``[U, d_out]``, as one wide product."""
    shape = tf.shape(base)
    y = tf.matmul(tf.reshape(h, [shape[0] * shape[1], tf.size(rows)]), b)
    return base + tf.reshape(y, shape)


def routed_linear(
    x: Any, base: Any, placed: Placed, tables: tuple[Any, Any], strategy: str, live: Live
) -> Any:
    """base + Σ_slots scale · B_slot (A_slot x).

    Args:
        x: ``[N, S, d_in]``.
        base: the frozen map's output, ``[N, S, d_out]``.
        placed: the batch's routing in this layer.
        tables: A ``[T, d_in]`` and B ``[T, d_out]``.
        strategy: ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
        live: which rows train.

    Returns:
        ``[N, S, d_out]``.
    """
    scale = tf.cast(placed.scale, x.dtype)
    if strategy in ("gather", "fused"):
        a, b = (fetch(table, placed.rows, live, x.dtype) for table in tables)
        return (_compiled_sum if strategy == "fused" else _gathered_sum)(x, base, a, b, scale)
    rows, factor = _shared_rows(placed, strategy, scale)
    a, b = (fetch(table, rows, live, x.dtype) for table in tables)
    shape = tf.shape(base)
    h = tf.matmul(tf.reshape(x, [shape[0] * shape[1], x.shape[2]]), a, transpose_b=True)
    h = tf.reshape(h, [shape[0], shape[1], tf.size(rows)]) * factor
    return _summed(base, h, rows, b)


def routed_embedding(
    tokens: Any, base: Any, placed: Placed, tables: tuple[Any, Any], strategy: str, live: Live
) -> Any:
    """base + Σ_slots scale · B_slot A_slot[token].

    A is as wide as the vocabulary, so the rows in use are gathered once for the batch, in every strategy; the
    strategies differ in B.

    Arguments as for :func:`routed_linear`, with token ids ``[N, S]`` for x, and A ``[T, vocabulary]``; ``"fused"`` is
    ``"gather"`` here.
    """
    dtype = base.dtype
    scale = tf.cast(placed.scale, dtype)
    gather = strategy in ("gather", "fused")
    rows, factor = (placed.union[0], None) if gather else _shared_rows(placed, strategy, scale)
    columns = tf.transpose(fetch(tables[0], rows, live, dtype))  # [vocabulary, U]
    h = tf.gather(columns, tokens)  # [N, S, U]
    if not gather:
        return _summed(base, h * factor, rows, fetch(tables[1], rows, live, dtype))
    sizes, used = tf.shape(tokens), tf.size(rows)
    h = tf.reshape(tf.transpose(h, [0, 2, 1]), [sizes[0] * used, sizes[1]])
    h = tf.gather(h, tf.range(sizes[0])[:, None] * used + placed.union[1])  # [N, R, S]
    h = tf.transpose(h, [0, 2, 1]) * scale[:, None, :]
    return base + tf.matmul(h, fetch(tables[1], placed.rows, live, dtype))
