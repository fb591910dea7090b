"""Layers for the planner's measurements (see :mod:`flix.core.strategy.calibrate`)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flix.backends.torch._context import activated, make_routing
from flix.backends.torch.layers import FlixLinear
from flix.core.config.config import FlixConfig
from flix.core.strategy.calibrate import Run
from flix.core.strategy.decide import Facts


def device_class() -> str:
    """The class of devices that is measured here."""
    return "torch-cuda" if torch.cuda.is_available() else "torch-cpu"


def make(config: FlixConfig, facts: Facts, ids: NDArray[np.int32], strategy: str | None) -> Run:
    """Forward and backward of one layer in float32, under a routing that is planned already, as in a model."""
    device = facts.device.removeprefix("torch-")
    draw = torch.Generator().manual_seed(0)
    shape = (facts.examples, facts.tokens)
    x = torch.randn(*shape, facts.d_in, generator=draw).to(device).requires_grad_()
    dy = torch.randn(*shape, facts.d_out, generator=draw).to(device)
    if strategy is None:
        layer: nn.Linear = nn.Linear(facts.d_in, facts.d_out).to(device).requires_grad_(False)
        routing = None
    else:
        layer = FlixLinear(facts.d_in, facts.d_out, config=config, strategy=strategy, device=device)
        routing = make_routing(config.registry, ids)
    parameters = [x, *layer.parameters()]

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        with activated(routing):
            layer(x).backward(dy)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def use_threads(count: int | None) -> str:
    """Compute with some number of threads, if one is given; the number in words."""
    if count is not None:
        torch.set_num_threads(count)
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"
