"""Layers for the tests of torch's kernels: natively on a CUDA device, elsewhere in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from flix.backends.torch import FlixLinear
from tests.helpers.registry import config
from tests.helpers.torch import layer_pairs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no CUDA device; test_triton_kernels.py runs this module in Triton's interpreter",
)


def layer_of(
    strategy: str,
    d_in: int,
    d_out: int,
    dtype: Any = torch.float32,
    settings: Any = None,
    bias: bool = True,
) -> FlixLinear:
    """A layer by hand, with drawn values."""
    settings = settings or config()
    layer = FlixLinear(d_in, d_out, bias, config=settings, name="layer", strategy=strategy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            parameter.data = parameter.data.to(dtype)
    return layer.to(DEVICE)


def step_of(
    layer: Any, shape: Any, ids: Any, weights: Any, dtype: Any = torch.float32, call: Any = None
) -> dict[str, Any]:
    """Everything a step gives: the output and all gradients."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    x.requires_grad_()
    weights = weights.to(DEVICE).clone().requires_grad_()
    y = (call or layer)(x, flix_features=ids, flix_weights=weights)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(dy.to(DEVICE, y.dtype))
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    for feature, pair in layer_pairs(layer).items():
        for side, parameter in zip("AB", pair, strict=True):
            if parameter.grad is not None:
                found[f"{side} {feature}"] = parameter.grad
    return {name: value.cpu() for name, value in found.items() if value is not None}
