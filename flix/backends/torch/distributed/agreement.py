"""Which features other processes activate, for sharded training.

Under FSDP2 all processes must reduce the gradients of the same parameters. Each knows only its own batch, so the
processes tell each other which features they activate, and parameters that only others use take part with zero
gradients. Without sharded parameters nothing is exchanged (DDP finds unused parameters by itself).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from flix.backends.torch.distributed.wrappers import active_ddp
from flix.backends.torch.parameters import Bank
from flix.backends.torch.state import FlixState
from flix.core.errors import ConfigError


def _sharded(model: nn.Module, bank: Bank) -> bool:
    """Whether the features' parameters are sharded tensors, as ``fully_shard`` makes them.

    While a module's forward runs, those that it holds itself are whole; the module then is one of FSDP's.
    """
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    if isinstance(model, fsdp) or isinstance(bank, fsdp):
        return True
    return any(hasattr(parameter, "device_mesh") for parameter in bank.parameters())


def _refuse_unreduced(model: nn.Module) -> None:
    """Refuse a trained head whose gradients nothing reduces while the features are sharded by flix.

    Raises:
        ConfigError: there is one.
    """
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    if isinstance(model, fsdp) or active_ddp() is not None:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not hasattr(parameter, "device_mesh"):
            raise ConfigError(
                f"{name} trains with sharded features, but nothing reduces its gradients over "
                f"the processes: wrap the "
                "model in DistributedDataParallel, which leaves sharded features alone, or fully_shard(model, "
                "ignored_params=set(model.flix_bank.parameters()))"
            )


def _number_of(bank: Bank) -> int:
    """A number that tells a bank's features, and which of them train, from others."""
    held = bank.held()
    trains = bytes(p.requires_grad for p in held.values())
    return zlib.crc32(repr((bank.keys, [*held])).encode(), zlib.crc32(trains)) & 0x7FFFFFFF


def touched_by_all(
    model: nn.Module, state: FlixState
) -> Callable[[np.ndarray[Any, Any]], tuple[int, ...]] | None:
    """A function that gives the ids that any process activates; None where processes need not agree."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if state.bank.sharding is None and not (model.training and _sharded(model, state.bank)):
        return None
    if state.bank.sharding is not None:
        if state.bank.sharding.kept is not None:  # under whole_features each process runs by itself
            return None
        _refuse_unreduced(model)
    device = torch.device("cpu")
    if "gloo" not in dist.get_backend():
        device = next(model.parameters()).device
    count = len(state.config.registry)

    def touched(ids: np.ndarray[Any, Any]) -> tuple[int, ...]:
        seen = np.zeros(count + 2, np.int32)
        seen[np.unique(ids[ids >= 0])] = 1
        # The greatest of a number and of its negative are each other's negative where all processes have the same.
        seen[count] = number = _number_of(state.bank)
        seen[count + 1] = -number
        told = torch.from_numpy(seen).to(device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        if state.bank.sharding is not None:
            state.bank.sharding.told = told.nbytes
        *found, greatest, least = told.tolist()
        if greatest != -least:
            raise ConfigError(
                "the processes do not train the same features: freeze, thaw, add, remove and "
                "rename features in all of them in the same way"
            )
        return tuple(i for i, acts in enumerate(found) if acts)

    return touched
