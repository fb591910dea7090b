"""Patch: the model's class.

What: an adapted model becomes an instance of a subclass of its own class, whose call takes ``flix_features`` and
``flix_weights``: a subclass, not a function patched onto the instance, so that split, merge, clone and copies keep it.
When: the model is adapted.
Undone: :func:`unrouted`, on the copy that ``merge`` makes. Python itself knows a class's subclasses, weakly: no table
of them is kept.
"""

from __future__ import annotations

import inspect
import threading
import types
from typing import Any

from flax import nnx

from flix.backends import messages
from flix.backends.jax import bypassed, scopes
from flix.backends.jax.layers import FlixLayer
from flix.backends.jax.patches.carrying import Carrying
from flix.backends.jax.patches.layers import change_class, drop_attributes
from flix.backends.jax.routing import CALL, current, in_force, make_routing, present_of, spread
from flix.core.config.config import FlixConfig

_making = threading.Lock()


class RoutedModel(Carrying):
    """What adapted models have in addition to their own class; ``isinstance(model, RoutedModel)`` recognises them."""

    flix_state: Any
    flix_depth: int

    @property
    def flix_config(self) -> FlixConfig:
        """The configuration."""
        return self.flix_state.config  # type: ignore[no-any-return]

    def _flix_virtual(self) -> tuple[Any, Any]:
        routing, mark = super()._flix_virtual()
        if routing is not None and self.flix_depth:
            # scan may take the model itself apart, and its routing with it.
            parts = (part for part in vars(self).values() if isinstance(part, nnx.Module))
            below = (module for part in parts for _, module in nnx.iter_modules(part))
            layer = next(module for module in below if isinstance(module, FlixLayer))
            left = self.flix_depth + len(layer.flix_lead) - len(layer.flix_spec.lead)
            routing = spread(routing, layer.flix_lead[: max(left, 0)])
        return routing, mark

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; pickles name the model's own class instead.
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return (_new_routed, (type(self).flix_plain,), state)  # type: ignore[attr-defined]


def _new_routed(base: type[nnx.Module]) -> Any:
    return object.__new__(routed_class(base))


def routed_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass of ``base`` whose call takes ``flix_features`` and ``flix_weights``; the same one each time."""
    with _making:
        made = (cls for cls in base.__subclasses__() if vars(cls).get("flix_plain") is base)
        return next(made, None) or _make_routed(base)


def _make_routed(base: type[nnx.Module]) -> type[nnx.Module]:

    def call(
        self: Any, *args: Any, flix_features: Any = None, flix_weights: Any = None, **kwargs: Any
    ) -> Any:
        if scopes.disabled(self):
            with scopes.own_key():
                return base.__call__(self, *args, **kwargs)
        if flix_features is None:
            if flix_weights is not None:
                raise messages.weights_alone()
            if in_force(self, base.__name__) is None:
                raise messages.unrouted_model(CALL)
            return bypassed.run(self, base.__call__, args, kwargs)
        present = present_of(self, base.__name__)
        routing = make_routing(
            self.flix_config.registry, flix_features, flix_weights, present=present
        )
        with current.under(routing=routing):
            return bypassed.run(self, base.__call__, args, kwargs)

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            __call__=call,
            __module__=base.__module__,
            __qualname__=base.__qualname__,
            __doc__=base.__doc__,
            flix_plain=base,
        )

    if callable(getattr(base, "__call__", None)):  # noqa: B004 - the class's, not the metaclass's
        signature = inspect.signature(base.__call__)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("flix_features", "flix_weights")
        ]
        ordered = sorted([*signature.parameters.values(), *added], key=lambda p: p.kind)
        call.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
        call.__doc__ = base.__call__.__doc__
    keywords = {"pytree": base._pytree__is_pytree}
    return types.new_class(base.__name__, (RoutedModel, base), keywords, body)


def route_calls(model: nnx.Module) -> None:
    """Let a plain model's call take routing."""
    change_class(model, routed_class(type(model)))


def unrouted(model: nnx.Module) -> None:
    """Give a model its own class back."""
    drop_attributes(model)
    change_class(model, type(model).flix_plain)  # type: ignore[attr-defined]
