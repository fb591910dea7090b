"""Activation checkpointing gives the plain gradients.

A checkpointed function runs twice: in the forward, and again in the backward when the model's forward is long over,
on another thread perhaps. The routing in force when it is first called is captured and put in force again for the
second run. Models reach ``torch.utils.checkpoint`` by many ways (by name, through partials they keep, through
transformers), but all of them end in two of its internals, looked up in its module at the call: these are wrapped.
They are left alone where no routing is in force. If a later torch has other internals, nothing is wrapped, and the
recomputation raises the error of a layer without routing instead of giving a silent zero.

Reentrant checkpoints give no gradient where no input requires one, as with a frozen embedding; under routing the
input is made to require it, so that the updates inside the block are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing

from flix.backends.torch.routing import activated, current

_GENERATOR = "_checkpoint_without_reentrant_generator"
_REENTRANT = "CheckpointFunction"


def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the routing of this moment in force whenever it runs."""
    routing = current.routing
    if routing is None:
        return function

    def rerun(*args: Any, **kwargs: Any) -> Any:
        with activated(routing):
            return function(*args, **kwargs)

    return rerun


def _requiring_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with a floating tensor that requires grad among them."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors):
        return args
    for place, arg in enumerate(args):
        if isinstance(arg, torch.Tensor) and arg.is_floating_point():
            return (*args[:place], arg.detach().requires_grad_(True), *args[place + 1 :])
    return args


def install() -> None:
    """Wrap the two internals, once."""
    generator = getattr(checkpointing, _GENERATOR, None)
    if generator is not None and not hasattr(generator, "flix_wrapped"):

        def generate(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return generator(_bound(fn), *args, **kwargs)

        generate.flix_wrapped = generator  # type: ignore[attr-defined]
        setattr(checkpointing, _GENERATOR, generate)

    reentrant = getattr(checkpointing, _REENTRANT, None)
    if reentrant is not None and not hasattr(reentrant, "flix_wrapped"):

        class CheckpointFunction(reentrant):  # type: ignore[misc, valid-type]
            """torch's own, called with functions that re-enter their routing."""

            flix_wrapped = reentrant

            @classmethod
            def apply(cls, run_function: Callable[..., Any], preserve: Any, *args: Any) -> Any:
                if current.routing is not None:
                    run_function, args = _bound(run_function), _requiring_grad(args)
                return reentrant.apply(  # type: ignore[union-attr]
                    run_function, preserve, *args
                )

        setattr(checkpointing, _REENTRANT, CheckpointFunction)
