"""The linear map inside each kind of nnx layer: how its kernel is a matrix, its input ``[..., d_in]``."""

from __future__ import annotations

import math
from typing import Union

import jax.numpy as jnp
from flax import nnx
from jax import Array

from flix.core.config.kernels import Form, linear_einsum

Found = tuple[Union[Form, None], str]
"""A form, or why there is none."""


def _found(kernel: Array, contracted: tuple[int, ...], free: tuple[int, ...]) -> Found:
    if kernel.ndim != len(contracted) + len(free):
        return None, f"its kernel has the shape {list(kernel.shape)} (layers stacked for scan?)"
    return Form(contracted, free, tuple(kernel.shape)), ""


def linear_form(layer: nnx.Linear | nnx.Embed, kernel: Array) -> Found:
    """The form of a Linear's kernel ``[d_in, d_out]``, or an Embed's table ``[vocabulary, d_out]``."""
    return _found(kernel, (0,), (1,))


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
