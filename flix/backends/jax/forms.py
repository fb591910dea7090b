"""The linear map inside each kind of nnx layer: how kernel and input flatten to ``[d_in, d_out]`` and ``[..., d_in]``.

The order is fixed, since files and other backends go by it: the kernel's axes that are contracted with the input, in
the kernel's order and row-major, are d_in; its other axes, in the kernel's order and row-major, are d_out.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from typing import Any, Union

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array


@dataclass(frozen=True)
class Form:
    """How a layer's kernel ``shape`` is a matrix.

    Attributes:
        contracted: the kernel's axes that are contracted with the input.
        free: the kernel's other axes.
        shape: the kernel's shape.
    """

    contracted: tuple[int, ...]
    free: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def d_in(self) -> int:
        return math.prod(self.shape[i] for i in self.contracted)

    @property
    def d_out(self) -> int:
        return math.prod(self.shape[i] for i in self.free)

    def unflatten(self, matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """``[d_in, d_out]`` in the kernel's own shape."""
        order = (*self.contracted, *self.free)
        split = matrix.reshape([self.shape[i] for i in order])
        return np.transpose(split, np.argsort(order))


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
    x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    return x.reshape(*x.shape[: x.ndim - len(axes)], -1)


@dataclass(frozen=True)
class Equation:
    """An einsum over an input and a kernel, in letters; ``...`` stands for the input's leading axes.

    Attributes:
        kept: the input's letters that the output keeps, in the input's order (``...`` included).
        contracted: letters of input and kernel that the output lacks, in the kernel's order.
        free: the kernel's letters that the output has, in the kernel's order.
        given, output, kernel: the letters of input, output and kernel.
    """

    kept: str
    contracted: str
    free: str
    given: str
    output: str
    kernel: str


def parse_equation(text: str) -> tuple[Equation | None, str]:
    """The parts of an einsum, or why the layer is not a linear map with one kernel matrix."""
    operands, output = text.replace(" ", "").split("->")
    given, kernel = operands.split(",")
    if "..." in kernel:
        return None, "its kernel's einsum letters have an ellipsis"
    dots = "." if "..." in given else ""
    given, output = given.replace("...", "."), output.replace("...", ".")
    if any(len(set(letters)) != len(letters) for letters in (given, kernel, output)):
        return None, "its einsum repeats a letter"
    if any(c in output and c in given for c in kernel):
        return None, "its einsum gives every entry of an input axis a kernel of its own"
    if any(c not in output and c not in given for c in kernel) or any(
        c not in output and c not in kernel for c in given
    ):
        return None, "its einsum sums over an axis of one operand alone"
    if dots and "." not in output:
        return None, "its einsum sums over the input's leading axes"
    contracted = "".join(c for c in kernel if c in given)
    free = "".join(c for c in kernel if c not in given)
    if not contracted or not free:
        return None, "its einsum contracts no axis, or leaves none of the kernel's"
    kept = "".join(c for c in given if c not in kernel)
    return Equation(kept, contracted, free, given, output, kernel), ""


def einsum_form(layer: nnx.Einsum, kernel: Array) -> Found:
    """The form of an Einsum's kernel."""
    if layer.einsum_str is None:
        return None, "its einsum is given only when it is called"
    equation, reason = parse_equation(layer.einsum_str)
    if equation is None:
        return None, reason
    places = {letter: i for i, letter in enumerate(equation.kernel)}
    contracted, free = (tuple(places[c] for c in x) for x in (equation.contracted, equation.free))
    return _found(kernel, contracted, free)


def einsum_input(equation: Equation, x: Array) -> Array:
    """An Einsum's input as ``[*kept, d_in]``."""
    extra = _extra(equation, x.ndim - len(equation.given.replace(".", "")))
    given, kept = equation.given.replace(".", extra), equation.kept.replace(".", extra)
    x = jnp.einsum(f"{given}->{kept}{equation.contracted}", x)
    return x.reshape(*x.shape[: len(kept)], -1)


def einsum_moved(equation: Equation, y: Array, sizes: tuple[int, ...], back: bool) -> Array:
    """An Einsum's output as ``[*kept, d_out]``, or (``back``) that in the output's own order.

    Args:
        equation: the einsum.
        y: the output, or the flattened output.
        sizes: the sizes of the free axes.
        back: the direction.
    """
    dots = y.ndim - (len(equation.kept.replace(".", "")) + (1 if back else len(sizes)))
    extra = _extra(equation, dots)
    kept, output = equation.kept.replace(".", extra), equation.output.replace(".", extra)
    if back:
        y = y.reshape(*y.shape[:-1], *sizes)
        return jnp.einsum(f"{kept}{equation.free}->{output}", y)
    y = jnp.einsum(f"{output}->{kept}{equation.free}", y)
    return y.reshape(*y.shape[: len(kept)], -1)


def _extra(equation: Equation, count: int) -> str:
    """Letters for the ellipsis."""
    taken = {*equation.given, *equation.kernel, *equation.output}
    return "".join([c for c in string.ascii_letters if c not in taken][:count])
