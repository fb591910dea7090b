"""A layer's inputs as TensorFlow has them: sizes that may be known at run time only, sparse ones, and their forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from flix.backends import messages
from flix.backends.tensorflow.routing import ActiveRouting, sizes
from flix.core.features.routing import fits


def dense(x: Any) -> Any:
    """A linear layer's input, made dense."""
    return tf.sparse.to_dense(tf.sparse.reorder(x)) if isinstance(x, tf.SparseTensor) else x


def rank(x: Any) -> int | None:
    """The number of dimensions, if known."""
    return x.shape.rank  # type: ignore[no-any-return]


def length(x: Any) -> Any:
    """The second size of an input: a number, or a scalar tensor."""
    if x.shape[1] is not None:
        return x.shape[1]
    return tf.cast(x.dense_shape[1], tf.int32) if isinstance(x, tf.SparseTensor) else tf.shape(x)[1]


def leading(x: Any, trailing: int) -> list[int | None]:
    """The sizes before the last ``trailing`` ones, as far as they are known."""
    return x.shape.as_list()[: x.shape.rank - trailing]  # type: ignore[no-any-return]


def grouped(
    x: Any, routing: ActiveRouting, trailing: int, lengths: Sequence[Any], name: str
) -> tuple[Any, tuple[Any, Any]]:
    """x with its leading dimensions fitted to the routing's rows.

    Args:
        x: ``[..., d_in]`` (trailing 1), or token ids ``[...]`` (trailing 0).
        routing: the routing in force.
        trailing: the number of dimensions of x that are not positions.
        lengths: how many positions may share a row where both are one dimension.
        name: the layer's; for messages.

    Returns:
        x (repeated where it has one row for all); the rows N and the positions S a row.

    Raises:
        RoutingError: the leading dimensions are not the routing's.
    """
    lead, given = routing.lead, leading(x, trailing)
    ways = fits(given, lead, [n if isinstance(n, int) else None for n in lengths])
    if not ways:
        raise messages.other_lead(name, given, lead)
    if "one" in ways:  # each row of the batch gets its own
        x = tf.repeat(x, sizes(routing.ids)[0], axis=0)
        given = x.shape.as_list()[: len(given)]
    if None not in given and None not in lead and ways != {"flat"}:
        known = math.prod(lead)  # type: ignore[arg-type]
        return x, (known, math.prod(given) // max(known, 1))  # type: ignore[arg-type]
    dynamic, rows = tf.shape(x), tf.shape(routing.ids)[:-1]
    count = tf.reduce_prod(rows)
    total = tf.reduce_prod(dynamic[: len(given)])
    if None in given or None in lead or ways == {"flat"}:
        same = tf.constant(False)
        if ways != {"flat"}:
            same = tf.reduce_all(dynamic[: len(lead)] == rows)
        for positions in lengths if "flat" in ways else ():
            same = same | tf.reduce_any(total == count * positions)
        error = str(messages.other_lead(name, given, lead))
        check = tf.debugging.Assert(same, [error])
        if check is not None:  # in a graph; None in eager mode
            with tf.control_dependencies([check]):
                x = tf.identity(x)
    return x, (count, total // tf.maximum(count, 1))


def shaped(y: Any, like: Any) -> Any:
    """y in the shape of another tensor."""
    y = tf.reshape(y, sizes(like))
    y.set_shape(like.shape)
    return y


def known_broken(y: Any) -> bool:
    """Whether values are known that are not finite: in eager mode."""
    if not tf.executing_eagerly():
        return False
    return not np.isfinite(tf.reduce_sum(tf.cast(y, tf.float32)))


def reads(run: Callable[[], Any], kernels: Mapping[str, Any]) -> list[str]:
    """Which of some variables a call reads, by tracing it."""
    graph = tf.function(run).get_concrete_function().graph
    read = {id(variable) for variable in graph.variables}
    return [path for path, kernel in kernels.items() if id(kernel.value) in read]


def spec(x: Any) -> Any:
    """An input as ``tf.TensorSpec`` for batches of any size."""
    shape = [None, *x.shape[1:]] if len(x.shape) else []
    return tf.TensorSpec(shape, tf.as_dtype(x.dtype), name=getattr(x, "name", None))


def zeros(spec: Any) -> Any:
    """A batch of one row in such a form."""
    return np.zeros([1 if size is None else size for size in spec.shape], spec.dtype.as_numpy_dtype)
