"""Modules whose values stay in memory while the rest of their model is offloaded, or is given memory without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_BEFORE = "flix_before_hook"


class Resident(nn.Module):
    """A module that is never run by the model's forward, so that what brings offloaded values back never comes to it.

    accelerate's offloading moves the parameters of every module to the meta device, and brings them back for the
    module's forward. Here they are put back at once, the same tensors as before: optimizers and layers go on with them.
    Hooks that place parameters on another device do so. ``Module.to_empty``, which gives a meta model memory, moves
    what has values already.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        held = vars(self)
        if (
            name == "_old_forward"
        ):  # accelerate sets it first, then moves the parameters, then sets the other two
            held[_BEFORE] = (dict(self._parameters), dict(self._buffers))
        elif name == "_hf_hook" and any(_emptied(self, held.get(_BEFORE))):
            parameters, buffers = held.pop(_BEFORE)
            self._parameters.update(parameters)
            self._buffers.update(buffers)
            return
        elif name == "forward" and "_hf_hook" not in held:
            return
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if getattr(fn, "__qualname__", "").startswith("Module.to_empty."):
            given, where = fn, fn(torch.empty(0)).device

            def fn(value: Tensor) -> Tensor:
                return given(value) if value.is_meta else value.to(where)

        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _emptied(module: nn.Module, before: Any) -> Any:
    """Of each parameter, whether a hook has taken its values away."""
    known = before[0] if before else {}
    for name, parameter in module._parameters.items():
        old = known.get(name)
        yield old is not None and parameter is not None and parameter.is_meta and not old.is_meta
