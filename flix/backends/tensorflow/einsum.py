"""Einsum equations as linear maps: which axes of a kernel are inputs, which are outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearEinsum:
    """An equation ``input,kernel->output`` that is a linear map applied at every position.

    The kernel as a matrix: its input axes in the kernel's order, flattened row by row, give d_in; its output axes
    in the kernel's order, flattened row by row, give d_out.

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

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(d_in, d_out) of a kernel of this shape."""
        at = dict(zip(self.kernel, shape, strict=True))
        return math.prod(at[x] for x in self.contracted), math.prod(at[x] for x in self.made)

    @property
    def kernel_order(self) -> list[int]:
        """The permutation that puts the kernel's input axes first, for a reshape to ``[d_in, d_out]``."""
        return [self.kernel.index(label) for label in self.contracted + self.made]

    def input_order(self, rank: int) -> list[int]:
        """The permutation of an input of this rank that puts its positions first, contracted axes last."""
        labels = _expanded(self.inputs, rank)
        leading = [i for i, label in enumerate(labels) if label not in self.contracted]
        return leading + [labels.index(label) for label in self.contracted]

    def output_order(self, rank: int, input_rank: int) -> list[int]:
        """The permutation from [positions in the input's order, made axes] to the output's own order."""
        source = [x for x in _expanded(self.inputs, input_rank) if x not in self.contracted]
        source += list(self.made)
        return [source.index(label) for label in _expanded(self.outputs, rank)]


def _expanded(labels: str, rank: int) -> list[str]:
    """Labels as a list, with "." spelled out for this rank."""
    elided = rank - len(labels.replace(".", ""))
    expanded: list[str] = []
    for label in labels:
        expanded += [f".{i}" for i in range(elided)] if label == "." else [label]
    return expanded


def linear_einsum(equation: str) -> LinearEinsum | str:
    """The equation as a linear map, or the reason why it is none."""
    try:
        operands, outputs = equation.replace(" ", "").replace("...", ".").split("->")
        inputs, kernel = operands.split(",")
    except ValueError:
        return f"its equation {equation!r} is not of the form input,kernel->output"
    if "." in kernel or len(set(kernel)) != len(kernel):
        return f"its equation {equation!r} elides or repeats axes of the kernel"
    for label in kernel:
        if label in inputs and label in outputs:
            return f"its equation {equation!r} keeps the axis {label!r} of input and kernel apart"
        if label not in inputs and label not in outputs:
            return f"its equation {equation!r} sums the kernel's axis {label!r} alone"
    contracted = "".join(label for label in kernel if label in inputs)
    made = "".join(label for label in kernel if label in outputs)
    positions = [label for label in inputs if label not in contracted]
    if sorted(positions) != sorted(label for label in outputs if label not in made):
        return f"its equation {equation!r} sums the input over positions"
    if not positions or inputs[0] in contracted or outputs[0] in made:
        return f"its equation {equation!r} has no batch as its first axis"
    if not contracted or not made:
        return f"its equation {equation!r} is not a map from one space to another"
    return LinearEinsum(kernel, contracted, made, inputs, outputs)
