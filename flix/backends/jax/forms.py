"""The linear map inside each kind of nnx layer: how its kernel is a matrix, its input ``[..., d_in]``."""

from __future__ import annotations

import math
from typing import Any, Union

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from flix.core.adapter.adapter import LayerShape
from flix.core.config.kernels import Form, linear_einsum

FLOATS = ("float64", "float32", "float16", "bfloat16")
Found = tuple[Union[Form, None], str]
"""A form, or why there is none."""


def _found(
    kernel: Array, contracted: tuple[int, ...], free: tuple[int, ...], sizes: tuple[int, ...]
) -> Found:
    """The form of a kernel, by itself or in a stack; of a stack the last axes are the layer's own sizes."""
    stacked = kernel.ndim - len(contracted) - len(free)
    own = tuple(kernel.shape[max(stacked, 0) :])
    if stacked < 0 or (stacked and own != sizes):
        return None, f"its kernel has the shape {list(kernel.shape)}, not [..., {str([*sizes])[1:]}"
    return Form(contracted, free, own), ""


def linear_form(layer: nnx.Linear | nnx.Embed, kernel: Array) -> Found:
    """The form of a Linear's kernel ``[d_in, d_out]``, or an Embed's table ``[vocabulary, d_out]``."""
    if isinstance(layer, nnx.Embed):
        return _found(kernel, (0,), (1,), (layer.num_embeddings, layer.features))
    return _found(kernel, (0,), (1,), (layer.in_features, layer.out_features))


def own_forward(module: nnx.Module) -> LayerShape | None:
    """Kind and sizes of a layer whose own forward is called: its class is the user's, or a library's.

    Subclasses of Linear and Embed; and quantised layers of any class that say ``in_features`` and ``out_features`` and
    hold an array of integers, or of floats of eight bits. None for other modules.
    """
    if isinstance(module, nnx.Embed):
        return LayerShape(module.num_embeddings, module.features, "embedding")
    d_in, d_out = (vars(module).get(name) for name in ("in_features", "out_features"))
    if not (isinstance(d_in, int) and isinstance(d_out, int) and min(d_in, d_out) > 0):
        return None
    known = isinstance(module, nnx.Linear) or quantised(module)
    return LayerShape(d_in, d_out, "linear") if known else None


def _arrays(module: nnx.Module) -> list[Any]:
    """The arrays that a layer holds itself."""
    own = [v for v in vars(module).values() if not isinstance(v, nnx.Module)]
    # qwix's have parts; and a layer may keep a dtype itself, which has one too.
    held = [
        leaf for leaf in jax.tree.leaves(own) if hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    ]
    return [leaf for leaf in held if not isinstance(leaf, type)]


def stacked_values(module: nnx.Module, shape: LayerShape) -> bool:
    """Whether a layer with a forward of its own holds a kernel for each layer of a stack."""
    sizes = shape.d_in, shape.d_out
    return any(len(x.shape) > 2 and tuple(x.shape[-2:]) == sizes for x in _arrays(module))


def quantised(module: nnx.Module) -> str:
    """The dtype of what a layer holds of integers, or of floats of eight bits; empty where there is none."""
    found = [str(value.dtype) for value in _arrays(module) if value.ndim > 1]
    return next(
        (name for name in found if name.startswith(("int", "uint", "float8", "float4"))), ""
    )


def general_form(layer: nnx.LinearGeneral, kernel: Array) -> Found:
    """The form of a LinearGeneral's kernel ``[*in, *out]``."""
    if layer.batch_axis:
        return None, "its batch_axis gives every batch entry a kernel of its own"
    inputs, outputs = len(layer.in_features), len(layer.out_features)
    sizes = (*layer.in_features, *layer.out_features)
    return _found(kernel, tuple(range(inputs)), tuple(range(inputs, inputs + outputs)), sizes)


def general_input(layer: nnx.LinearGeneral, x: Array) -> Array:
    """A LinearGeneral's input ``[..., *in]`` (in any order of axes) as ``[..., d_in]``."""
    axes = tuple(axis % x.ndim for axis in layer.axis)
    return flattened(jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim)), len(axes))


def flattened(x: Array, count: int) -> Array:
    """An array whose last axes, so many, are one."""
    lead = x.ndim - count
    return x.reshape(*x.shape[:lead], math.prod(x.shape[lead:]))


def einsum_form(layer: nnx.Einsum, kernel: Array) -> Found:
    """The form of an Einsum's kernel."""
    if layer.einsum_str is None:
        return None, "its einsum is given only when it is called"
    equation = linear_einsum(layer.einsum_str)
    if isinstance(equation, str):
        return None, equation
    free = tuple(range(len(equation.kernel)))
    form, reason = _found(kernel, (), free, tuple(layer.kernel_shape))
    return (None if form is None else equation.form(form.shape)), reason
