"""How a kernel of several axes is one matrix ``[d_in, d_out]`` (docs/specification.md §1.1).

The order is fixed, since files and other backends go by it: the kernel's axes that are contracted with the input, in
the kernel's order and row-major, are d_in; its other axes, in the kernel's order and row-major, are d_out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Form:
    """How a layer's kernel is a matrix.

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
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the free axes."""
        return tuple(self.shape[i] for i in self.free)

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation of the kernel's axes that leaves a reshape to ``[d_in, d_out]``."""
        return (*self.contracted, *self.free)

    def at(self, rows: NDArray[Any], columns: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Where in the kernel's own shape entries of its matrix ``[d_out, d_in]`` stand, by axis."""
        contracted = np.unravel_index(columns, [self.shape[i] for i in self.contracted])
        places = dict(zip(self.contracted, contracted, strict=True))
        places.update(zip(self.free, np.unravel_index(rows, self.sizes), strict=True))
        return tuple(places[axis] for axis in range(len(self.shape)))

    def unflatten(self, matrix: NDArray[Any]) -> NDArray[Any]:
        """``[d_in, d_out]`` in the kernel's own shape."""
        split = matrix.reshape([self.shape[i] for i in self.order])
        return np.transpose(split, np.argsort(self.order))


@dataclass(frozen=True)
class LinearEinsum:
    """An equation ``input,kernel->output`` that is a linear map applied at every position.

    Attributes:
        kernel: the kernel's axes.
        contracted: those that the input shares, in the kernel's order.
        made: those that the output shares, in the kernel's order.
        inputs: the input's axes, with "." for elided ones.
        outputs: the output's, likewise.
    """

    kernel: str
    contracted: str
    made: str
    inputs: str
    outputs: str

    def form(self, shape: tuple[int, ...]) -> Form:
        """How a kernel of this shape is a matrix."""
        contracted, free = (tuple(map(self.kernel.index, x)) for x in (self.contracted, self.made))
        return Form(contracted, free, shape)

    @property
    def batch_first(self) -> bool:
        """Whether the first axis of input and output is a position."""
        return self.inputs[0] not in self.contracted and self.outputs[0] not in self.made

    def input_order(self, rank: int) -> list[int]:
        """The permutation of an input of this rank that puts its positions first, contracted axes last."""
        labels = _expanded(self.inputs, rank)
        leading = [i for i, label in enumerate(labels) if label not in self.contracted]
        return leading + [labels.index(label) for label in self.contracted]

    def output_order(self, rank: int) -> list[int]:
        """The permutation from [positions in the input's order, made axes] to the output's own order of this rank."""
        positions = rank - len(self.made)
        source = _expanded(self.inputs, positions + len(self.contracted))
        source = [x for x in source if x not in self.contracted] + list(self.made)
        return [source.index(label) for label in _expanded(self.outputs, rank)]


def _expanded(labels: str, rank: int) -> list[str]:
    """Labels as a list, with "." spelled out for this rank."""
    elided = rank - len(labels.replace(".", ""))
    expanded: list[str] = []
    for label in labels:
        expanded += [f".{i}" for i in range(elided)] if label == "." else [label]
    return expanded


def linear_einsum(equation: str) -> LinearEinsum | str:
    """The equation as a linear map of the input with one kernel matrix, or the reason why it is none."""
    try:
        operands, outputs = equation.replace(" ", "").replace("...", ".").split("->")
        inputs, kernel = operands.split(",")
    except ValueError:
        return f"its equation {equation!r} is not of the form input,kernel->output"
    if "." in kernel or any(len({*axes}) != len(axes) for axes in (inputs, kernel, outputs)):
        return f"its equation {equation!r} elides axes of the kernel, or repeats an axis"
    for label in kernel:
        if label in inputs and label in outputs:
            return f"its equation {equation!r} gives each entry of the axis {label!r} a kernel of its own"
        if label not in inputs and label not in outputs:
            return f"its equation {equation!r} sums the kernel's axis {label!r} alone"
    contracted = "".join(label for label in kernel if label in inputs)
    made = "".join(label for label in kernel if label in outputs)
    positions = [label for label in inputs if label not in contracted]
    if sorted(positions) != sorted(label for label in outputs if label not in made):
        return f"its equation {equation!r} sums the input over positions"
    if not contracted or not made:
        return f"its equation {equation!r} is not a map from one space to another"
    return LinearEinsum(kernel, contracted, made, inputs, outputs)
