"""What a layer whose own forward is called becomes as a composition is merged into it (docs/specification.md §5.3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from flix.backends.jax import forms
from flix.backends.jax.layers import kernel_of
from flix.core.adapter.adapter import LayerShape
from flix.core.errors import TargetError

_ROWS = 4
"""Rows of a trial."""


def fold(layer: Any, path: str, update: NDArray[np.float64]) -> None:
    """Add an update to the kernel of a layer with a forward of its own, where its output then changes by it.

    Args:
        layer: the plain layer; it is changed.
        path: its path, for messages.
        update: ``[d_in, d_out]``.

    Raises:
        TargetError: its kernel is quantised, or it computes otherwise than by its kernel, as a trial shows.
    """
    kernel, shape = kernel_of(layer), forms.own_forward(layer)
    assert shape is not None
    if kernel is None or forms.quantised(layer) or str(kernel[...].dtype) not in forms.FLOATS:
        raise _refused(layer, path, f"its kernel is quantised ({forms.quantised(layer) or 'own'})")
    x = _probe(shape, kernel[...].dtype)
    before, value = _run(layer, x), kernel[...]
    host = _wide(value)
    folded = jax.device_put(jnp.asarray(host + update, value.dtype), value.sharding)
    # A variable of its own: other modules may share the base's.
    name = "embedding" if shape.kind == "embedding" else "kernel"
    setattr(layer, name, type(kernel)(folded, **kernel.get_metadata()))
    after = _run(layer, x)
    if before is None or after is None:
        raise _refused(layer, path, "its forward does not take a batch of vectors alone")
    change = _applied(x, _wide(folded) - host, shape)
    if not _close(after - before, change, before, value.dtype):
        raise _refused(layer, path, "its output does not change as its kernel does")


def check_own(layer: Any, path: str) -> None:
    """Refuse a layer whose kernel is another library's: its model quantises whatever kernel it finds as it runs.

    Raises:
        TargetError: it is.
    """
    kernel = vars(layer).get("kernel")
    if kernel is not None and not isinstance(kernel, nnx.Variable):
        raise TargetError(
            f"layer {path!r} ({type(layer).__name__}) cannot be merged: its kernel is quantised "
            f"({type(kernel).__module__.split('.')[0]}'s {type(kernel).__name__}), and the model would quantise a plain one "
            "again as it runs; merge before the model is quantised"
        )


def make_plain(layer: Any, path: str, update: NDArray[np.float64]) -> None:
    """Turn a layer with a forward of its own, in place, into the Linear or Embed that computes the same plus an update.

    Raises:
        TargetError: it is no linear map of its input, as a trial shows.
    """
    shape = forms.own_forward(layer)
    assert shape is not None
    tokens, dtype = shape.kind == "embedding", _dtype(layer)
    x = _probe(shape, dtype)
    zero = None if tokens else _run(layer, jnp.zeros((1, shape.d_in), dtype))
    wanted = _run(layer, x)
    if wanted is None or (zero is None and not tokens):
        raise TargetError(
            f"layer {path!r} ({type(layer).__name__}) cannot be run on a batch of vectors alone"
        )
    steps = range(0, shape.d_in, 1024)
    rows: list[Any] = [_run(layer, _units(shape, start, dtype)) for start in steps]
    kernel: NDArray[Any] = np.concatenate(rows)
    bias = np.zeros((1, shape.d_out)) if zero is None else zero
    kernel = kernel if tokens else kernel - bias
    if not _close(wanted, _applied(x, kernel, shape) + bias, wanted, dtype):
        raise TargetError(
            f"layer {path!r} ({type(layer).__name__}) is not a linear map of its input, or not "
            f"one that can be read from it, so it cannot become a plain layer. Leave it out of "
            f"target_modules to merge the rest"
        )
    value = jnp.asarray(kernel + update, dtype)
    if tokens:
        made: Any = nnx.Embed(shape.d_in, shape.d_out, param_dtype=dtype, rngs=nnx.Rngs(0))
        made.embedding[...] = value
    else:
        own = getattr(layer, "bias", None)
        has_bias = bool(bias.any()) or isinstance(own, nnx.Variable)
        made = nnx.Linear(
            shape.d_in, shape.d_out, use_bias=has_bias, param_dtype=dtype, rngs=nnx.Rngs(0)
        )
        made.kernel[...] = value
        if has_bias:
            made.bias[...] = jnp.asarray(bias[0], dtype)
    object.__setattr__(layer, "__class__", type(made))
    vars(layer).clear()
    vars(layer).update(vars(made))


def _dtype(layer: Any) -> Any:
    """What a layer computes in: that of its values, or float32."""
    held = (v.get_raw_value() for v in vars(layer).values() if isinstance(v, nnx.Variable))
    known = [getattr(layer, "dtype", None), *(getattr(value, "dtype", None) for value in held)]
    return next((jnp.dtype(d) for d in known if str(d) in forms.FLOATS), jnp.dtype("float32"))


def _probe(shape: LayerShape, dtype: Any) -> jax.Array:
    rng = np.random.default_rng(0)
    if shape.kind == "embedding":
        return jnp.asarray(rng.integers(0, shape.d_in, _ROWS), jnp.int32)
    return jnp.asarray(rng.normal(size=(_ROWS, shape.d_in)), dtype)


def _units(shape: LayerShape, start: int, dtype: Any) -> jax.Array:
    stop = min(start + 1024, shape.d_in)
    if shape.kind == "embedding":
        return jnp.arange(start, stop)
    return jnp.eye(stop - start, shape.d_in, start, dtype)


def _applied(x: jax.Array, kernel: NDArray[Any], shape: LayerShape) -> NDArray[Any]:
    found: NDArray[Any] = kernel[np.asarray(x)] if shape.kind == "embedding" else _wide(x) @ kernel
    return found


def _wide(value: Any) -> NDArray[np.float64]:
    return np.asarray(value.astype(jnp.promote_types(value.dtype, jnp.float32)), np.float64)


def _run(layer: Any, x: jax.Array) -> NDArray[np.float64] | None:
    """What a layer gives, in float64 on the host; None where it cannot be run so."""
    try:
        y = layer(x)
    except Exception:
        return None
    return _wide(y) if getattr(y, "shape", ())[:1] == x.shape[:1] else None


def _close(got: Any, wanted: Any, size: NDArray[Any], dtype: Any) -> bool:
    """Whether values are the same up to the rounding of a product in a dtype whose results are of some size."""
    eps = float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]
    off = 16 * eps * np.abs(size).max() + 0.02 * np.abs(wanted).max()
    return bool(np.abs(got - wanted).max() <= off)


def _refused(layer: Any, path: str, reason: str) -> TargetError:
    return TargetError(
        f"layer {path!r} ({type(layer).__name__}) cannot be merged: {reason}; "
        "merge(model, row, dequantize=True) turns it into a plain layer"
    )
