"""Which features other processes activate, for sharded training.

Under FSDP2 all processes must reduce the gradients of the same parameters. Each knows only its own batch, so the
processes tell each other which features they activate, and parameters that only others use take part with zero
gradients. Without sharded parameters nothing is exchanged (DDP finds unused parameters by itself).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from flix.backends.torch.parameters import Bank
from flix.backends.torch.state import FlixState


def _sharded(model: nn.Module, bank: Bank) -> bool:
    """Whether the features' parameters are sharded tensors, as ``fully_shard`` makes them.

    While a module's forward runs, those that it holds itself are whole; the module then is one of FSDP's.
    """
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    if isinstance(model, fsdp) or isinstance(bank, fsdp):
        return True
    return any(hasattr(parameter, "device_mesh") for parameter in bank.parameters())


def touched_by_all(
    model: nn.Module, state: FlixState
) -> Callable[[np.ndarray[Any, Any]], tuple[int, ...]] | None:
    """A function that gives the ids that any process activates; None where processes need not agree."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if not model.training or not _sharded(model, state.bank):
        return None
    device = torch.device("cpu")
    if "gloo" not in dist.get_backend():
        device = next(model.parameters()).device
    count = len(state.config.registry)

    def touched(ids: np.ndarray[Any, Any]) -> tuple[int, ...]:
        seen = torch.zeros(count, dtype=torch.int32, device=device)
        mine = np.unique(ids[ids >= 0])
        seen[torch.as_tensor(mine, device=device)] = 1
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return tuple(seen.nonzero().flatten().tolist())

    return touched
