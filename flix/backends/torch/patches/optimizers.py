"""torch's optimizers, around their steps.

What: two hooks that torch runs around the step of every optimizer. When: from the first adapted model or layer on,
once. Undone: by :func:`uninstall`; the hooks keep no model alive.

Before a step, absent features of compiled models are kept where they are. In eager mode the parameter of a feature
that is absent from a batch takes no part, so it gets no gradient and no optimizer moves it. A compiled graph is fixed:
it gives every parameter a gradient, zero for the absent, and weight decay or momentum would then move them.
A compiled forward therefore marks the features it sees in a buffer of the model, and gradients of features not seen
since the last step are taken away.

A reducer of gradients over processes is told of both: a process whose batches gave none takes part then.

After a step, values that were made of parameters are out of date: fused optimizers change tensors without counting it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from flix.core.errors import ConfigError

steps = 0
"""How many steps optimizers have made."""

_states: weakref.WeakSet[Any] = weakref.WeakSet()
_handles: list[Any] = []


def install() -> None:
    """Register the hooks, if they are not."""
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before))
        _handles.append(register_optimizer_step_post_hook(_after))


def uninstall() -> None:
    """Take the hooks out again."""
    while _handles:
        _handles.pop().remove()


def watch(state: Any) -> None:
    """Look after compiled forwards of the model that carries a state, and its pager, until it is gone."""
    install()
    _states.add(state)


def _traced(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The states of models that were run compiled, and that an optimizer trains."""
    states = [state for state in _states if state.traced]
    if not states:
        return []
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [s for s in states if any(id(p) in held for p in s.bank.parameters())]


def take_away(state: Any) -> None:
    """Take away what a compiled model gave its absent features as gradients.

    Raises:
        ConfigError: there are several processes, and nothing tells them what the others saw.
    """
    if state.traced:
        _refuse_alone(state)
        present = state.bank.present.tolist()
        for i, parameter in state.bank.held().items():
            if not present[i]:
                parameter.grad = None


def _refuse_alone(state: Any) -> None:
    """Which features a compiled step saw is known to its own process; in several, a reducer must tell the others."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and state.reducer is None:
        raise ConfigError(
            "a compiled step in several processes knows only which features its own batch had, "
            "so the processes would drift apart; "
            "call reduce_features(model), also where DDP wraps it (for processes that train apart: with a group of one)"
        )


def begin_anew(state: Any) -> None:
    """Forget which features compiled forwards saw."""
    if state.traced:
        state.bank.present.zero_()
        state.traced = False


def _before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for sharding, bank in [
        (s.bank.sharding, s.bank) for s in _states if s.bank.sharding is not None
    ]:
        sharding.check(optimizer, bank)
    for state in [state for state in _states if state.reducer is not None]:
        state.reducer.before_step(optimizer)
    for state in _traced(optimizer):
        take_away(state)


def _after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    global steps
    steps += 1
    for state in _traced(optimizer):
        begin_anew(state)
    for state in [*_states]:
        if state.reducer is not None:
            state.reducer.after_step(optimizer)
        if state.pager is not None:
            state.pager.after_step()
