"""Modules whose forward accelerate has wrapped, on the instance, to place and offload their parameters.

What: ``dispatch_model``, ``cpu_offload`` and their kin keep a module's forward as ``_old_forward`` and put one of
their own on the instance, which brings the parameters, calls the old one, and takes the parameters away. A class that
such a module gets later would never run. When: :func:`rebind` is called where a module gets another class. Undone:
where it gets its own class back, by the same function.
"""

from __future__ import annotations

import functools
import types

import torch
from torch import nn


def runs_own(module: nn.Module) -> bool:
    """Whether a call ends in the forward of a module's class: nothing stands before it but accelerate's wrapper."""
    held = vars(module)
    if "forward" not in held:
        return True
    # A wrapper that was taken away leaves the class's own forward on the instance.
    own = held.get("_old_forward") if "_hf_hook" in held else held["forward"]
    return _is_of(own, type(module))


def rebind(module: nn.Module, before: type[nn.Module]) -> None:
    """Let what stands on the instance call the forward of a module's class, which was ``before`` until now."""
    held = vars(module)
    if _is_of(held.get("forward"), before):
        del held["forward"]
    if not _is_of(held.get("_old_forward"), before):
        return
    new = held["_old_forward"] = types.MethodType(type(module).forward, module)
    if (wrapper := held.get("forward")) is not None:
        vars(wrapper).pop(
            "__signature__", None
        )  # generation asks the wrapper which arguments a model takes
        functools.update_wrapper(wrapper, new)


def _is_of(forward: object, cls: type[nn.Module]) -> bool:
    return isinstance(forward, types.MethodType) and forward.__func__ is cls.forward


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its tensors lie, or are brought; the CPU for one that has no values yet."""
    held = next((v for v in (*module.parameters(False), *module.buffers(False))), None)
    if held is not None and not held.is_meta:
        return held.device
    hook = vars(module).get("_hf_hook")
    where = getattr(hook, "execution_device", None)
    return torch.device("cpu" if where is None else where)
