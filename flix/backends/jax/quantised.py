"""Kernels of the pure functions that are quantised: integers and scales, or a function that computes with them.

``linear`` and ``embed`` take, in the place of an array, a mapping with the values and their ``"scale"``, or a function
of the input that gives the base's output (docs/specification.md §5.3). Values are ``"kernel"``, ``"qvalue"`` (the name
in qwix and AQT) or ``"embedding"``; the kernel that they stand for is ``(values - zero_point) * scale``. A scale has
the kernel's axes, of size 1 where one scale is for all, or smaller by a whole number where it is for a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Union

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from flix.core.errors import TargetError

Kernel = Union[Array, Mapping[str, Any], Callable[[Array], Array]]
VALUES = ("kernel", "qvalue", "embedding")


def values_of(kernel: Any, path: str) -> Any:
    """The array of a kernel: itself, or the values of a mapping; None of a function.

    Raises:
        TargetError: a mapping without values or a scale, or with a scale of other axes.
    """
    if not isinstance(kernel, Mapping):
        return None if callable(kernel) else kernel
    values = next((kernel[name] for name in VALUES if name in kernel), None)
    if values is None or "scale" not in kernel:
        raise TargetError(
            f"layer {path!r}: a quantised kernel is a mapping with 'scale' and one of {list(VALUES)}, got {list(kernel)}"
        )
    for name in ("scale", "zero_point"):
        shape = jnp.shape(kernel[name]) if kernel.get(name) is not None else ()
        sizes = zip(reversed(values.shape), reversed(shape))  # noqa: B905 - those that a scale has
        if len(shape) > 2 or any(size % own for size, own in sizes):
            raise TargetError(
                f"layer {path!r}: the kernel's values are {list(values.shape)}, its {name} {list(shape)}; each axis is "
                "the kernel's, 1, or divides it"
            )
    return values


def product(x: Array, kernel: Kernel, path: str, d_out: int) -> Array:
    """x W, in the dtype of x where W is quantised."""
    if isinstance(kernel, Mapping):
        return jnp.matmul(x, _whole(kernel, values_of(kernel, path), jnp).astype(x.dtype))
    if callable(kernel):
        return _checked(kernel(x), (*x.shape[:-1], d_out), path)
    return jnp.matmul(x, kernel)


def lookup(tokens: Array, table: Kernel, path: str, d_out: int) -> Array:
    """Rows of a table; those of a quantised one are in the dtype of its scale."""
    if isinstance(table, Mapping):
        values = values_of(table, path)
        rows = {name: _rows(value, tokens, len(values)) for name, value in table.items()}
        found: Array = _whole(rows, jnp.take(values, tokens, axis=0), jnp)
        return found
    if callable(table):
        return _checked(table(tokens), (*tokens.shape, d_out), path)
    return jnp.take(table, tokens, axis=0)


def dequantised(kernel: Mapping[str, Any], path: str) -> NDArray[np.float64]:
    """The kernel that a mapping stands for, on the host."""
    host = {
        name: np.asarray(jnp.asarray(value).astype(jnp.float32), np.float64)
        for name, value in kernel.items()
        if value is not None
    }
    return np.asarray(_whole(host, values_of(host, path), np), np.float64)


def _rows(value: Any, tokens: Array, rows: int) -> Any:
    """What a table's rows of these tokens have of an array beside it."""
    value = jnp.asarray(value)
    if value.ndim < 2 or value.shape[0] == 1:
        return value.reshape(value.shape[-1:])
    return jnp.take(value, tokens // (rows // value.shape[0]), axis=0)


def _whole(kernel: Mapping[str, Any], values: Any, library: Any) -> Any:
    scale = _spread(kernel["scale"], values, library)
    values = values.astype(scale.dtype)
    if kernel.get("zero_point") is not None:
        values = values - _spread(kernel["zero_point"], values, library).astype(scale.dtype)
    return values * scale


def _spread(scale: Any, values: Any, library: Any) -> Any:
    """A scale each of whose axes is 1 or the values'."""
    scale = library.asarray(scale)
    for axis in range(-1, -1 - scale.ndim, -1):
        size, count = scale.shape[axis], values.shape[axis]
        if size not in (1, count):
            scale = library.repeat(scale, count // size, axis)
    return scale


def _checked(y: Array, shape: tuple[int, ...], path: str) -> Array:
    if y.shape != shape:
        raise TargetError(
            f"layer {path!r}: the kernel's function gives {list(y.shape)}, not {list(shape)}"
        )
    return y
