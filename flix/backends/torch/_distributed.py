"""Which features other processes activate, for sharded training.

Under FSDP2 all processes must reduce the gradients of the same parameters. Each knows only its own batch, so the
processes tell each other which features they activate, and parameters that only others use take part with zero
gradients. Without sharded parameters nothing is exchanged (DDP finds unused parameters by itself).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from flix.backends.torch._layer import FlixLayer


def _is_sharded(model: nn.Module) -> bool:
    """Whether the adapted parameters are sharded tensors, as ``fully_shard`` makes them."""
    for module in model.modules():
        if isinstance(module, FlixLayer):
            for _, a, _ in module.pairs():
                return hasattr(a, "device_mesh")
    return False


def touched_by_all(model: nn.Module) -> Callable[[np.ndarray[Any, Any]], tuple[int, ...]] | None:
    """A function that gives the ids that any process activates; None where processes need not agree."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if not model.training or not _is_sharded(model):
        return None
    device = torch.device("cpu")
    if "gloo" not in dist.get_backend():
        device = next(model.parameters()).device
    count = len(model.flix_config.registry)  # type: ignore[union-attr, arg-type]

    def touched(ids: np.ndarray[Any, Any]) -> tuple[int, ...]:
        seen = torch.zeros(count, dtype=torch.int32, device=device)
        mine = np.unique(ids[ids >= 0])
        seen[torch.as_tensor(mine, device=device)] = 1
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return tuple(seen.nonzero().flatten().tolist())

    return touched
