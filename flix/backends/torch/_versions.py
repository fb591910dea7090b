"""When parameters have changed since they were looked at.

A tensor counts its changes, but fused optimizers change tensors without counting; so optimizer steps count, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


def version(tensor: Tensor) -> int:
    """How often a tensor was changed, as far as it counts; inference tensors do not."""
    return -1 if tensor.is_inference() else tensor._version


def state(params: Sequence[Tensor]) -> tuple[int, ...]:
    """What differs after any of some parameters has changed: their versions, and the optimizer steps so far."""
    return (_steps, *(p._version for p in params))
