"""Modules of experts in dense form, token by token: what the adapted ones are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Delta = Callable[[int, int], Any]
"""The update ``[d_out, d_in]`` of a kernel for a token and an expert, or None."""


def forward(module: Any, tokens: Any, index: Any, weights: Any, deltas: Mapping[str, Delta]) -> Any:
    """The experts' weighted sum of each token with kernels of its own, by a loop over tokens.

    Args:
        module: a plain module of experts.
        tokens: ``[tokens, d]``.
        index: the experts that each token is sent to, ``[tokens, k]``.
        weights: of these.
        deltas: the updates of kernels by parameter.
    """

    def product(name: str, x: Any, t: int, e: int) -> Any:
        kernel = getattr(module, name)[e]
        if module.is_transposed:
            kernel = kernel.T
        if name in deltas and (delta := deltas[name](t, e)) is not None:
            kernel = kernel + delta
        y = kernel @ x
        return y + getattr(module, f"{name}_bias")[e] if module.has_bias else y

    rows = []
    for t, x in enumerate(tokens):
        total = torch.zeros_like(x)
        for e, weight in zip(index[t].tolist(), weights[t], strict=True):
            y = product("gate_up_proj", x, t, e)
            total = total + weight * product("down_proj", module._apply_gate(y[None])[0], t, e)
        rows.append(total)
    return torch.stack(rows)
