"""The routed sum in interchangeable strategies, in plain differentiable operations.

A layer keeps A of all features in one table ``[1 + rows, d_in]`` and B, transposed, in another ``[1 + rows, d_out]``;
row 0 of each is zero and stands for unused slots. Only rows in use are gathered, so forward and backward cost the
same however many features are registered, and gradients are ``tf.IndexedSlices`` over the rows in use. Nothing of
size ``[d_out, d_in]`` is made for an example.

Values that are not finite stay in their rows (docs/specification.md §1.5). With ``"gather"`` each row has operands of
its own. Wide products share them, and 0 times NaN is NaN: there :func:`_project` and :func:`_expand` look whether all
is finite, mostly in small products that they have anyway, and leave out and mark what is not only if there is such.
Slots whose weight is 0 stand at row 0, too; :func:`_with_factors_of_zero` gives their weights the gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from flix.backends.keras.parameters import Live
from flix.backends.tensorflow.patches.captures import in_branch
from flix.backends.tensorflow.routing import Placed, sizes


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
        nothing = tf.zeros([], moving.dtype)
        moving = tf.where(trains[..., None], moving - tf.stop_gradient(moving), nothing)
        values = tf.stop_gradient(values) + moving
    return tf.cast(values, dtype)


def _gathered_sum(x: Any, base: Any, a: Any, b: Any, scale: Any) -> Any:
    """base ``[N, S, d_out]`` + each example's product with its own rows, A ``[N, R, d_in]`` and B ``[N, R, d_out]``."""
    h = tf.matmul(x, a, transpose_b=True) * scale[:, None, :]
    return base + tf.matmul(h, b)


# The rows are gathered outside, so that gradients of the tables stay sparse; XLA fuses the rest, forward and backward.
_compiled_sum = tf.function(_gathered_sum, jit_compile=True, reduce_retracing=True)


def _finite(x: Any, axis: int | None = None) -> Any:
    return tf.reduce_all(tf.math.is_finite(x), axis)


def _selected(h: Any, table: Any, used: Any = None) -> Any:
    """h ``[N, S, U]``, zero but where used ``[N, U]``, times a table ``[U, d]``: ``[N, S, d]``.

    With ``used``, rows that use a row of the table that is not finite are NaN, and the others do not meet it.
    """
    shape, clean = sizes(h), table
    if used is not None:
        broken = ~_finite(table, 1)
        clean = tf.where(broken[:, None], tf.zeros_like(table), table)
    y = tf.matmul(tf.reshape(h, [shape[0] * shape[1], shape[2]]), clean)
    y = tf.reshape(y, [shape[0], shape[1], table.shape[1]])
    if used is not None:
        hit = tf.reduce_any(used & broken, 1)[:, None, None]
        y = tf.where(hit, tf.constant(np.nan, y.dtype), y)
    return y


def _collected(h: Any, x: Any, used: Any = None) -> Any:
    """The sum over rows and positions of h ``[N, S, U]``, zero but where used, times x ``[N, S, d]``: ``[U, d]``.

    With ``used``, only what is used by a row whose x is not finite gets NaN.
    """
    shape, clean = sizes(h), x
    count = shape[0] * shape[1]
    if used is not None:
        broken = ~_finite(x, 2)
        clean = tf.where(broken[:, :, None], tf.zeros_like(x), x)
    flat = tf.reshape(h, [count, shape[2]])
    y = tf.matmul(flat, tf.reshape(clean, [count, x.shape[2]]), transpose_a=True)
    if used is not None:
        hit = tf.reduce_any(used & tf.reduce_any(broken, 1)[:, None], 0)[:, None]
        y = tf.where(hit, tf.constant(np.nan, y.dtype), y)
    return y


def _project(x: Any, a: Any, used: Any) -> Any:
    """x ``[N, S, d_in]`` times a ``[U, d_in]``, transposed: ``[N, S, U]``, of which the cells in use go on."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def project(x: Any, a: Any) -> Any:
        shape = sizes(x)
        h = tf.matmul(tf.reshape(x, [shape[0] * shape[1], x.shape[2]]), a, transpose_b=True)
        h = tf.reshape(h, [shape[0], shape[1], sizes(a)[0]])

        def backward(dh: Any) -> tuple[Any, Any]:
            return tf.cond(  # type: ignore[no-any-return]
                _finite(h),  # so are x and a then
                lambda: (_selected(dh, a), _collected(dh, x)),
                lambda: (_selected(dh, a, used), _collected(dh, x, used)),
            )

        return h, backward

    return project(x, a)


def _expand(h: Any, b: Any, used: Any) -> Any:
    """h ``[N, S, U]``, zero but where used ``[N, U]``, times b ``[U, d_out]``: ``[N, S, d_out]``."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def expand(h: Any, b: Any) -> Any:
        y = tf.cond(_finite(b), lambda: _selected(h, b), lambda: _selected(h, b, used))

        def backward(dy: Any) -> tuple[Any, Any]:
            shape = sizes(h)
            dh = tf.matmul(tf.reshape(dy, [shape[0] * shape[1], b.shape[1]]), b, transpose_b=True)
            dh = tf.reshape(dh, shape)
            sound = _finite(dh)  # so is dy then
            return dh, tf.cond(sound, lambda: _collected(h, dy), lambda: _collected(h, dy, used))

        return y, backward

    return expand(h, b)


def _cells(h: Any, factor: Any, used: Any) -> Any:
    """h ``[N, S, U]`` times the rows' factors ``[N, U]`` in the cells in use, else zero, forward and backward."""
    return tf.where(used[:, None, :], h, tf.zeros([], h.dtype)) * factor[:, None, :]


def _one_composition(placed: Placed, scale: Any) -> tuple[Any, Any]:
    """The rows that serve the whole batch, ``[R]``, and each example's factors for them, ``[N, 1, R]``.

    Each keeps its own factors, so that its weights get their own gradient. Where routing is known only at run time,
    rows that differ are an error there, and NaN where XLA leaves errors out.
    """
    if placed.rows.shape[0] != 1 and not tf.executing_eagerly():
        alike = tf.reduce_all(placed.rows == placed.rows[:1], 1)
        rule = (
            "strategy 'single' needs one composition for all rows; use 'auto', 'gather' or 'masked'"
        )
        with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(alike), [rule])]):
            scale = tf.where(alike[:, None], scale, tf.constant(np.nan, scale.dtype))
    return tf.reshape(placed.rows[:1], [-1]), scale[:, None, :]


def _summed(base: Any, h: Any, rows: Any, b: Any) -> Any:
    """base ``[N, S, d_out]`` plus h ``[N, S, U]`` times b ``[U, d_out]``, as one wide product."""
    shape = sizes(base)
    y = tf.matmul(tf.reshape(h, [shape[0] * shape[1], sizes(rows)[0]]), b)
    return base + tf.reshape(y, shape)


def _with_factors_of_zero(y: Any, placed: Placed, dtype: Any, project: Any, tables: Any) -> Any:
    """y as it is, and the gradient of factors that are 0, whose slots are no part of the sum.

    Args:
        y: ``[N, S, d_out]``.
        placed: the batch's routing in this layer.
        dtype: of the products.
        project: gives the rank-space values ``[N, S, R]`` of rows ``[N, R]`` of A.
        tables: A and B.
    """
    asleep = placed.asleep
    if asleep is None:
        return y

    def values() -> tuple[Any, Any]:
        return project(tables[0], asleep), tf.cast(tf.gather(tables[1], asleep), dtype)

    kept = values() if in_branch() else None  # a loop's gradient cannot reach variables

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def attached(y: Any, scale: Any) -> Any:
        def backward(dy: Any) -> tuple[Any, Any]:
            def products() -> Any:
                h, b = kept or values()
                found = tf.reduce_sum(tf.matmul(dy, b, transpose_b=True) * h, 1)
                return tf.where(asleep > 0, tf.cast(found, scale.dtype), tf.zeros_like(scale))

            some = tf.reduce_any(asleep > 0)
            return dy, tf.cond(some, products, lambda: tf.zeros_like(scale))

        return tf.identity(y), backward

    return attached(y, placed.scale)


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

    def project(a: Any, rows: Any) -> Any:
        return tf.matmul(x, tf.cast(tf.gather(a, rows), x.dtype), transpose_b=True)

    y = _linear_sum(x, base, placed, tables, strategy, live)
    return _with_factors_of_zero(y, placed, x.dtype, project, tables)


def _linear_sum(
    x: Any, base: Any, placed: Placed, tables: tuple[Any, Any], strategy: str, live: Live
) -> Any:
    """See :func:`routed_linear`."""
    scale = tf.cast(placed.scale, x.dtype)
    if strategy in ("gather", "fused"):
        a, b = (fetch(table, placed.rows, live, x.dtype) for table in tables)
        return (_compiled_sum if strategy == "fused" else _gathered_sum)(x, base, a, b, scale)
    if strategy == "masked":
        rows, used = placed.union[0], placed.used
        a, b = (fetch(table, rows, live, x.dtype) for table in tables)
        h = _cells(_project(x, a, used), tf.cast(placed.mask, x.dtype), used)
        return base + _expand(h, b, used)
    rows, factor = _one_composition(placed, scale)
    a, b = (fetch(table, rows, live, x.dtype) for table in tables)
    shape = sizes(base)
    h = tf.matmul(tf.reshape(x, [shape[0] * shape[1], x.shape[2]]), a, transpose_b=True)
    h = tf.reshape(h, [shape[0], shape[1], sizes(rows)[0]]) * factor
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

    def project(a: Any, rows: Any) -> Any:
        shape = sizes(tokens)
        at = tf.broadcast_to(rows[:, None, :], [shape[0], shape[1], sizes(rows)[1]])
        cells = tf.stack([at, tf.broadcast_to(tokens[:, :, None], sizes(at))], -1)
        return tf.cast(tf.gather_nd(tf.convert_to_tensor(a), cells), base.dtype)

    y = _embedding_sum(tokens, base, placed, tables, strategy, live)
    return _with_factors_of_zero(y, placed, base.dtype, project, tables)


def _embedding_sum(
    tokens: Any, base: Any, placed: Placed, tables: tuple[Any, Any], strategy: str, live: Live
) -> Any:
    """See :func:`routed_embedding`."""
    dtype = base.dtype
    scale = tf.cast(placed.scale, dtype)
    single = strategy == "single"
    rows, factor = _one_composition(placed, scale) if single else (placed.union[0], None)
    columns = tf.transpose(fetch(tables[0], rows, live, dtype))  # [vocabulary, U]
    h = tf.gather(columns, tokens)  # [N, S, U]
    if single:
        return _summed(base, h * factor, rows, fetch(tables[1], rows, live, dtype))
    if strategy == "masked":
        h = _cells(h, tf.cast(placed.mask, dtype), placed.used)
        return base + _expand(h, fetch(tables[1], rows, live, dtype), placed.used)
    (count, length), used = sizes(tokens), sizes(rows)[0]
    h = tf.reshape(tf.transpose(h, [0, 2, 1]), [count * used, length])
    h = tf.gather(h, tf.range(count)[:, None] * used + placed.union[1])  # [N, R, S]
    h = tf.transpose(h, [0, 2, 1]) * scale[:, None, :]
    return base + tf.matmul(h, fetch(tables[1], placed.rows, live, dtype))
