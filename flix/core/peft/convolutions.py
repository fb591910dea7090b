"""Pairs of convolutions: matrices here, kernels in PEFT's files (docs/specification.md §5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def as_convolutions(
    tensors: Mapping[str, NDArray[np.float32]], kernels: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float32]]:
    """A LoRA whose pairs of convolutions have PEFT's form: A ``[r, C, k...]``, B ``[d_out, r, 1...]``.

    Args:
        tensors: PEFT's tensors, as matrices.
        kernels: the kernel's sizes of each layer that is a convolution.
    """
    made = dict(tensors)
    for path, sizes in kernels.items():
        for side in "AB":
            name = f"base_model.model.{path}.lora_{side}.weight"
            shape = (-1, *sizes) if side == "A" else (made[name].shape[1], *[1] * len(sizes))
            made[name] = made[name].reshape(len(made[name]), *shape)
    return made


def as_matrices(parts: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The pair of a convolution, A ``[r, C, k...]`` and B ``[d_out, r, 1...]``, as matrices; others as they are."""
    a, b = parts.get("A"), parts.get("B")
    if a is None or b is None or not 2 < a.ndim == b.ndim < 6 or any(n != 1 for n in b.shape[2:]):
        return dict(parts)
    return {**parts, "A": a.reshape(len(a), -1), "B": b.reshape(b.shape[:2])}
