"""What may stand around an adapted model in several processes: which wrapper runs it, and which cannot be right."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flix.backends.torch.parameters import BANK
from flix.backends.torch.state import FlixState
from flix.core.errors import ConfigError


def active_ddp() -> Any:
    """The DDP wrapper whose forward runs, or None."""
    return DistributedDataParallel._active_ddp_module


def names_of(module: nn.Module, state: FlixState) -> list[str]:
    """The names of a model's features, and of what compiled steps note of them, among a module's parameters."""
    path = next(name for name, held in module.named_modules() if held is state.bank)
    own = [*state.bank._parameters, "present"]
    return [f"{path}.{name}" for name in own]


def refuse(state: FlixState) -> None:
    """Look at what runs an adapted model's forward.

    Raises:
        ConfigError: FSDP1, DeepSpeed's ZeRO, or DDP that was told to leave the features to a reducer that this model
            does not have.
    """
    ddp = active_ddp()
    if ddp is not None and state.reducer is None and state.bank.sharding is None:
        told = getattr(ddp, "parameters_to_ignore", ())
        if told and any(f"{BANK}." in name for name in told):
            raise ConfigError(
                "DDP was told to leave the features out, and nothing reduces them: this model is a copy of the one that "
                "reduce_features was called on, or its reducer was stopped; call reduce_features(model) before DDP"
            )
    if "torch.distributed.fsdp" in sys.modules and _flattened(state):
        raise ConfigError(
            "FSDP1 (FullyShardedDataParallel) flattens all features into one tensor, so that every step would move those "
            "that are absent; shard with fully_shard (FSDP2), or run DDP with reduce_features(model)"
        )
    if "deepspeed" in sys.modules and _of_deepspeed(state):
        raise ConfigError(
            "DeepSpeed's ZeRO flattens the features into one tensor, so that every step would move those that are absent; run "
            "DDP with reduce_features(model), or shard with shard_features(model, mesh)"
        )


def _flattened(state: FlixState) -> bool:
    """Whether FSDP1 holds the features: it takes the parameters away, or marks those that it keeps."""
    held = state.bank._parameters
    if not held:
        layout = state.bank.layout
        return any(layout.length(i) for i in range(len(state.bank.features)))
    first: Any = next(iter(held.values()))
    # In a forward they are views of the one tensor.
    return any(getattr(value, "_fsdp_flattened", False) for value in (first, first._base))


def _of_deepspeed(state: FlixState) -> bool:
    """Whether DeepSpeed's ZeRO has taken the features: it marks every parameter, at stages 1 and 2, and at 3."""
    first = next(iter(state.bank._parameters.values()), None)
    return hasattr(first, "_hp_mapping") or hasattr(first, "ds_id")


def sharded(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a sharded tensor, as ``fully_shard`` makes them."""
    return hasattr(parameter, "device_mesh")
