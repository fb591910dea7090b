"""The classes of users' models, whose calls take routing.

What: an adapted model (and an encoder that generation calls by itself) becomes an instance of a subclass of its own
class, with ``flix_features`` and ``flix_weights`` among its call's keywords. When: by ``adapt`` and ``load``. Undone:
``merge`` and ``share_base`` give the copy its own class back. A subclass, not a function patched onto the instance, so
that copies of a model run their own weights. A class keeps its subclass.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from typing import Any

from torch import nn

from flix.backends import messages
from flix.backends.torch import bypassed, scopes
from flix.backends.torch.calls import generation_routing, routing_of
from flix.backends.torch.parameters import BANK
from flix.backends.torch.patches import whisper
from flix.backends.torch.patches.resizing import resizing
from flix.backends.torch.routing import current, tracing
from flix.backends.torch.state import FlixState
from flix.core.config.config import FlixConfig
from flix.core.errors import RoutingError, TargetError

_KEPT = "_flix_routed"  # the class's own attribute that holds its subclass


class RoutedModel:
    """What adapted models have in addition to their own class; ``isinstance(model, RoutedModel)`` recognises them.

    Attributes:
        flix_state: everything that flix stores on the model.
    """

    flix_state: FlixState

    @property
    def flix_config(self) -> FlixConfig:
        """The configuration."""
        return self.flix_state.config

    def print_trainable_parameters(self) -> None:
        """Print how much trains, under PEFT's name for it; :func:`~flix.backends.torch.summary` has more."""
        from flix.backends.torch import summary  # its verbs stand on this module

        print(summary(self).line)

    @property
    def peft_config(self) -> Any:
        """PEFT's mark of its models, which adapted models lack; if PEFT sets it, that is a ``TargetError``."""
        raise AttributeError("peft_config")

    @peft_config.setter
    def peft_config(self, _: Any) -> None:
        # What get_peft_model and add_adapter do last.
        raise TargetError(
            "PEFT's layers would wrap adapted ones, freeze the features and rename the layers; "
            "use one of the "
            "two: import_peft turns LoRAs into features, merge(model, row) gives PEFT a plain "
            "model. This model now has PEFT's layers in it: adapt or load a fresh one"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; copies and pickles name the model's own class instead.
        made = super().__reduce_ex__(protocol)
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            made = (_new_routed, (plain_class(type(self)), *made[1][1:]), *made[2:])
        return made


def state_of(verb: str, model: Any) -> FlixState:
    """What an adapted model carries.

    Raises:
        TargetError: the model is not adapted, which ``verb`` needs.
    """
    if not isinstance(model, RoutedModel):
        raise messages.not_adapted(verb, model)
    return model.flix_state


def _new_routed(base: type[nn.Module], *args: Any) -> Any:
    cls = routed_class(base)
    return cls.__new__(cls, *args)


def plain_class(cls: type[Any]) -> type[nn.Module]:
    """The model's own class behind a routed one."""
    return cls.flix_plain if issubclass(cls, RoutedModel) else cls  # type: ignore[attr-defined,no-any-return]


def routed_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``base`` whose forward takes ``flix_features`` and ``flix_weights``."""
    if _KEPT in vars(base):
        return vars(base)[_KEPT]  # type: ignore[no-any-return]

    def forward(
        self: Any, *args: Any, flix_features: Any = None, flix_weights: Any = None, **kwargs: Any
    ) -> Any:
        previous = current.routing
        current.routing = routing_of(self, flix_features, flix_weights, args, kwargs)
        try:
            result = bypassed.run(self, current.routing, base.forward, args, kwargs)
        finally:
            current.routing = previous
        reducer = self.flix_state.reducer
        if reducer is not None and previous is None and not tracing():
            reducer.watch(result)
        return result

    signature = inspect.signature(base.forward)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("flix_features", "flix_weights")
    ]
    old = list(signature.parameters.values())
    tail = [p for p in old if p.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [p for p in old if p not in tail] + added + tail
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__
    members = {
        "forward": forward,
        "flix_plain": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if callable(getattr(base, "generate", None)):
        members |= {"generate": _generate_of(base), **whisper.members_of(base)}
    if callable(getattr(base, "resize_token_embeddings", None)):
        members["resize_token_embeddings"] = resizing(base)
    if hasattr(base, "init_continuous_batching"):
        members["init_continuous_batching"] = _refuse_continuous_batching
    for name in ("save_pretrained", "push_to_hub"):
        if callable(getattr(base, name, None)):
            members[name] = _refuse_whole
    if not hasattr(base, "no_sync"):
        members["no_sync"] = property(_no_sync)
    if issubclass(base, nn.Sequential | nn.ModuleList):
        members |= {"__len__": _len_of_steps, "__iter__": _iter_of_steps}
    made = type(base.__name__, (RoutedModel, base), members)
    setattr(base, _KEPT, made)
    return made


def _no_sync(self: Any) -> Any:
    """Of models whose gradients a reducer averages, where accelerate and loops for DDP look for it."""
    if self.flix_state.reducer is None:
        raise AttributeError("no_sync")
    return self.flix_state.reducer.no_sync


def _len_of_steps(self: Any) -> int:
    return len(self._modules) - (BANK in self._modules)  # it comes last, and is not a step


def _iter_of_steps(self: Any) -> Any:
    return iter([module for name, module in self._modules.items() if name != BANK])


def _generate_of(base: Any) -> Any:
    """The ``generate`` of a model class, with routing that is checked, and in a form that beams and samples repeat."""

    @functools.wraps(base.generate)
    def generate(
        self: Any, *args: Any, flix_features: Any = None, flix_weights: Any = None, **kwargs: Any
    ) -> Any:
        if scopes.in_force(self.flix_state) is not scopes.OFF:
            if flix_features is not None:
                kwargs |= generation_routing(self, flix_features, flix_weights, args, kwargs)
            elif flix_weights is not None:
                raise messages.weights_alone()
        return base.generate(self, *args, **kwargs)

    return generate


def _refuse_whole(self: Any, *_: Any, **__: Any) -> Any:
    """``save_pretrained`` and ``push_to_hub``: from_pretrained would drop the features, and the base answer alone."""
    raise TargetError(
        "save_pretrained and push_to_hub write a whole model, from which from_pretrained would read the base alone; "
        "save(model, folder) writes the features, push(model, name) pushes them to a hub, and "
        "merge(model, row).save_pretrained(folder) writes one composition as a plain model"
    )


def _refuse_continuous_batching(self: Any, *_: Any, **__: Any) -> Any:
    """What transformers' ``generate_batch`` begins with: requests packed into one row, run on another thread."""
    raise RoutingError(
        "continuous batching (generate_batch) gives the model no routing, so the base would answer alone; "
        "call generate() with flix_features, or merge(model, row) and serve the plain model"
    )
