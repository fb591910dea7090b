"""The routed sum in interchangeable strategies, in ``keras.ops``, with gradients written out.

A layer keeps A of all features in one table ``[1 + rows, d_in]`` and B, transposed, in another ``[1 + rows, d_out]``;
row 0 of each is zero and stands for unused slots. Only rows in use are gathered and multiplied; the tables' gradients
are as large as the tables. Nothing of size ``[d_out, d_in]`` is made for an example.

The gradients are written out for two rules that those of the plain operations break. Values that are not finite stay
in their rows (docs/specification.md §1.5): 0 times NaN is NaN, so wide products leave out and mark what is not
finite. And a slot whose weight is 0 is no part of the sum, whatever its values are, while its weight has a gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from flix.backends.keras.parameters import Live
from flix.backends.keras.static import hosts
from flix.backends.keras.static.routing import Placed


def _upstream(args: Any, upstream: Any) -> Any:
    """The gradient of a result: Keras hands it over last, or by name on torch."""
    return args[-1] if upstream is None else upstream


def _zeros(x: Any) -> Any:
    return ops.zeros((), x.dtype)


def _nan(x: Any) -> Any:
    return ops.cast(np.nan, x.dtype)


def _t(x: Any) -> Any:
    return ops.swapaxes(x, -1, -2)


def _moving(awake: Any, rows: Any, live: Live) -> Any:
    """Which of the gathered rows have a gradient: those in use that train."""
    if live is None:
        return awake
    return ops.logical_and(awake, ops.take(ops.convert_to_tensor(live), rows, axis=0))


def _counted(rows: Any, moving: Any, use: Any) -> Any:
    """How often each row of a table is in use, in the form of ``flix_use``."""
    ones = ops.reshape(ops.cast(moving, use.dtype), (-1,))
    return ops.segment_sum(ones, ops.reshape(rows, (-1,)), num_segments=use.shape[0])


def fetch(table: Any, use: Any, rows: Any, moving: Any, dtype: Any) -> Any:
    """Rows of a table; those that move have a gradient, and count in that of ``use``.

    Args:
        table: ``[T, d]``.
        use: ``[T]``, the layer's ``flix_use``.
        rows: int32, any shape.
        moving: bool in that shape.
        dtype: of the result.

    Returns:
        ``[*rows.shape, d]``.
    """

    @ops.custom_gradient  # type: ignore[untyped-decorator]
    def fetched(table: Any, use: Any) -> Any:
        def backward(*args: Any, upstream: Any = None) -> tuple[Any, Any]:
            dy = ops.cast(_upstream(args, upstream), table.dtype)
            dy = ops.where(moving[..., None], dy, _zeros(dy))
            flat = ops.reshape(dy, (-1, table.shape[1]))
            found = ops.segment_sum(flat, ops.reshape(rows, (-1,)), num_segments=table.shape[0])
            return found, _counted(rows, moving, use)

        return ops.cast(ops.take(table, rows, axis=0), dtype), backward

    return fetched(table, use)


def _cells(table: Any, use: Any, rows: Any, tokens: Any, moving: Any, dtype: Any) -> Any:
    """The values ``[N, S, R]`` of rows ``[N, R]``, or ``[R]`` for all, of an embedding's A at token ids ``[N, S]``."""
    single = len(rows.shape) == 1
    at = (rows[None, None] if single else rows[:, None, :], tokens[:, :, None])
    move = (moving[None] if single else moving)[:, None, :]

    @ops.custom_gradient  # type: ignore[untyped-decorator]
    def fetched(table: Any, use: Any) -> Any:
        def backward(*args: Any, upstream: Any = None) -> tuple[Any, Any]:
            dy = ops.cast(_upstream(args, upstream), table.dtype)
            dy = ops.where(move, dy, _zeros(dy))
            index = [ops.reshape(ops.broadcast_to(i, dy.shape), (-1,)) for i in at]
            empty = ops.zeros(table.shape, table.dtype)
            found = ops.scatter_update(
                empty, ops.stack(index, axis=1), ops.reshape(dy, (-1,)), reduction="add"
            )
            return found, _counted(rows, moving, use)

        return ops.cast(ops.get_item(table, at), dtype), backward

    return fetched(table, use)


def _finite(x: Any) -> Any:
    return ops.all(ops.isfinite(x), axis=-1)


def _selected(h: Any, table: Any, used: Any) -> Any:
    """h ``[N, S, U]``, zero but where used ``[N, U]``, times a table ``[U, d]``: ``[N, S, d]``.

    Rows that use a row of the table that is not finite are NaN, and the others do not meet it.
    """
    sound = _finite(table)
    y = ops.matmul(h, ops.where(sound[:, None], table, _zeros(table)))
    hit = ops.any(ops.logical_and(used, ops.logical_not(sound)), axis=1)[:, None, None]
    return ops.where(hit, _nan(y), y)


def _collected(h: Any, x: Any, used: Any) -> Any:
    """The sum over rows and positions of h ``[N, S, U]``, zero but where used, times x ``[N, S, d]``: ``[U, d]``.

    Only what is used by a row whose x is not finite gets NaN.
    """
    sound = _finite(x)
    clean = ops.where(sound[:, :, None], x, _zeros(x))
    y = ops.matmul(_t(ops.reshape(h, (-1, h.shape[2]))), ops.reshape(clean, (-1, x.shape[2])))
    broken = ops.logical_not(ops.all(sound, axis=1))[:, None]
    hit = ops.any(ops.logical_and(used, broken), axis=0)[:, None]
    return ops.where(hit, _nan(y), y)


def _projected(x: Any, a: Any, used: Any) -> Any:
    """x ``[N, S, d]`` times its rows of A, transposed: ``[N, S, R]``.

    Args:
        a: ``[N, R, d]``, each example's own; or ``[U, d]``, for all.
        used: bool ``[N, R]`` or ``[N, U]``: the cells that go on.
    """
    own = len(a.shape) == 3

    @ops.custom_gradient  # type: ignore[untyped-decorator]
    def project(x: Any, a: Any) -> Any:
        def backward(*args: Any, upstream: Any = None) -> tuple[Any, Any]:
            dh = _upstream(args, upstream)
            if own:
                return ops.matmul(dh, ops.where(used[..., None], a, _zeros(a))), ops.matmul(
                    _t(dh), x
                )
            return _selected(dh, a, used), _collected(dh, x, used)

        return ops.matmul(x, _t(a)), backward

    return project(x, a)


def _expanded(h: Any, b: Any, factor: Any, used: Any) -> Any:
    """Rank-space values ``[N, S, R]`` times factors ``[N, R]`` where used, times B: ``[N, S, d_out]``.

    Args:
        b: ``[N, R, d_out]``, each example's own; or ``[U, d_out]``, for all.
        factor, used: ``[N, R]`` or ``[N, U]``.
    """
    own = len(b.shape) == 3

    @ops.custom_gradient  # type: ignore[untyped-decorator]
    def expand(h: Any, b: Any, factor: Any) -> Any:
        scaled = ops.where(used[:, None, :], h * factor[:, None, :], _zeros(h))

        def backward(*args: Any, upstream: Any = None) -> tuple[Any, Any, Any]:
            dy = _upstream(args, upstream)
            dh = ops.matmul(dy, _t(b))
            dfactor = ops.sum(dh * h, axis=1)
            dh = ops.where(used[:, None, :], dh * factor[:, None, :], _zeros(dh))
            db = ops.matmul(_t(scaled), dy) if own else _collected(scaled, dy, used)
            return dh, db, dfactor

        if own:
            return ops.matmul(scaled, ops.where(used[..., None], b, _zeros(b))), backward
        return _selected(scaled, b, used), backward

    return expand(h, b, factor)


def _for_all(placed: Placed, strategy: str) -> tuple[Any, Any, Any]:
    """The rows that serve the batch ``[U]``, each example's factors for them ``[N, U]``, and which it uses.

    With ``"single"`` the first example's, which are all others', too: those that differ, as only a compiled function
    can find out, are NaN.
    """
    if strategy == "masked":
        return placed.union[0], placed.mask, placed.used
    rows, scale = placed.rows, placed.scale
    unlike = ops.any(rows != rows[:1], axis=1)[:, None]
    return rows[0], ops.where(unlike, _nan(scale), scale), ops.logical_or(placed.awake, unlike)


def _finished(base: Any, y: Any, placed: Placed) -> Any:
    if placed.bad is None:
        return base + y
    return ops.where(placed.bad[:, None, None], _nan(y), base + y)


def routed_linear(
    x: Any, base: Any, placed: Placed, tables: tuple[Any, Any, Any], strategy: str, live: Live
) -> Any:
    """base + Σ_slots scale · B_slot (A_slot x).

    Args:
        x: ``[N, S, d_in]``.
        base: the frozen map's output, ``[N, S, d_out]``.
        placed: the batch's routing in this layer.
        tables: A ``[T, d_in]``, B ``[T, d_out]`` and ``flix_use`` ``[T]``.
        strategy: ``"gather"``, ``"masked"`` or ``"single"``.
        live: which rows train.

    Returns:
        ``[N, S, d_out]``.
    """
    table_a, table_b, use = tables
    if strategy == "gather" or not placed.rows.shape[0] * placed.rows.shape[1]:
        rows, factor, used, moves = placed.rows, placed.scale, placed.awake, placed.awake
    else:
        rows, factor, used = _for_all(placed, strategy)
        moves = ops.any(used, axis=0)
    moving = _moving(moves, rows, live)
    a, b = (fetch(table, use, rows, moving, x.dtype) for table in (table_a, table_b))
    h = _projected(x, a, used)
    return _finished(base, _expanded(h, b, ops.cast(factor, x.dtype), used), placed)


def routed_embedding(
    tokens: Any, base: Any, placed: Placed, tables: tuple[Any, Any, Any], strategy: str, live: Live
) -> Any:
    """base + Σ_slots scale · B_slot A_slot[token].

    Arguments as for :func:`routed_linear`, with token ids ``[N, S]`` for x, and A ``[T, vocabulary]``.
    """
    table_a, table_b, use = tables
    if strategy == "gather" or not placed.rows.shape[0] * placed.rows.shape[1]:
        rows, factor, used, moves = placed.rows, placed.scale, placed.awake, placed.awake
    else:
        rows, factor, used = _for_all(placed, strategy)
        moves = ops.any(used, axis=0)
    moving = _moving(moves, rows, live)
    h = _cells(table_a, use, rows, tokens, moving, base.dtype)
    b = fetch(table_b, use, rows, moving, base.dtype)
    return _finished(base, _expanded(h, b, ops.cast(factor, base.dtype), used), placed)


def known_broken(y: Any) -> bool:
    """Whether values are known that are not finite: where they are computed at once, on a CPU."""
    if not hosts.known(y) or (not hosts.JAX and y.device.type != "cpu"):
        return False
    return not np.isfinite(ops.convert_to_numpy(ops.sum(ops.cast(y, "float32"))))
