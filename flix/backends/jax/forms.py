"""The linear map inside each kind of nnx layer: how its kernel is a matrix, its input ``[..., d_in]``."""

from __future__ import annotations

import math
from typing import Union

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from flix.core.adapter.adapter import LayerShape
from flix.core.config.kernels import Form, linear_einsum

FLOATS = ("float64", "float32", "float16", "bfloat16")
Found = tuple[Union[Form, None], str]
"""A form, or why there is none."""


def _found(kernel: Array, contracted: tuple[int, ...], free: tuple[int, ...]) -> Found:
    if kernel.ndim != len(contracted) + len(free):
        return None, f"its kernel has the shape {list(kernel.shape)} (layers stacked for scan?)"
    return Form(contracted, free, tuple(kernel.shape)), ""


def linear_form(layer: nnx.Linear | nnx.Embed, kernel: Array) -> Found:
    """The form of a Linear's kernel ``[d_in, d_out]``, or an Embed's table ``[vocabulary, d_out]``."""
    return _found(kernel, (0,), (1,))


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


def quantised(module: nnx.Module) -> str:
    """The dtype of what a layer holds of integers, or of floats of eight bits; empty where there is none."""
    own = [v for v in vars(module).values() if not isinstance(v, nnx.Module)]
    # qwix's have parts; and a layer may keep a dtype itself, which has one too.
    held = [
        leaf for leaf in jax.tree.leaves(own) if hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    ]
    held = [leaf for leaf in held if not isinstance(leaf, type)]
    found = [str(value.dtype) for value in held if value.ndim > 1]
    return next(
        (name for name in found if name.startswith(("int", "uint", "float8", "float4"))), ""
    )


def general_form(layer: nnx.LinearGeneral, kernel: Array) -> Found:
    """The form of a LinearGeneral's kernel ``[*in, *out]``."""
    if layer.batch_axis:
        return None, "its batch_axis gives every batch entry a kernel of its own"
    inputs, outputs = len(layer.in_features), len(layer.out_features)
    return _found(kernel, tuple(range(inputs)), tuple(range(inputs, inputs + outputs)))


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
    if kernel.ndim != len(equation.kernel):
        return _found(kernel, (), tuple(range(len(equation.kernel))))
    return equation.form(tuple(kernel.shape)), ""
