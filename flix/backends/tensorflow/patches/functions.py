"""The functions that a layer's own code has had compiled (``tf.function`` on its methods or attributes).

What: on a layer, an attribute of the function's name that stands in for it and has it traced apart for each kind of
call: a model that is off, routing by row, routing by token. What was traced before is left behind. When: layers of the
model become adapted, or its features change. Undone: :func:`take_off`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import tensorflow as tf

KIND = tf.types.experimental.PolymorphicFunction


class Apart:
    """A function, traced apart for each kind of call.

    Args:
        function: what it stands in for.
        owner: the layer that has it as a method; None of an attribute.
        kind: tells the calls apart.
    """

    def __init__(self, function: Any, owner: Any, kind: Callable[[], Any]) -> None:
        self.function, self.owner, self.kind = function, owner, kind
        self.traced: dict[Any, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = self.kind()
        if kind not in self.traced:
            self.traced.setdefault(kind, self.function._clone(None))
        own = () if self.owner is None else (self.owner,)
        return self.traced[kind](*own, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Apart:
        return Apart(self.function, copy.deepcopy(self.owner, memo), copy.deepcopy(self.kind, memo))


def tell_apart(layer: Any, kind: Callable[[], Any]) -> None:
    """Put stand-ins on a layer's functions; nothing is traced of them yet."""
    for name, function in [*_methods(layer).items(), *vars(layer).items()]:
        if isinstance(function, Apart):
            vars(layer)[name] = Apart(function.function, function.owner, kind)
        elif isinstance(function, KIND):
            owner = None if name in vars(layer) else layer
            vars(layer)[name] = Apart(function, owner, kind)


def take_off(layer: Any) -> None:
    """Give a layer its own functions back."""
    for name, function in list(vars(layer).items()):
        if isinstance(function, Apart) and function.owner is None:
            vars(layer)[name] = function.function
        elif isinstance(function, Apart):
            del vars(layer)[name]


def _methods(layer: Any) -> dict[str, Any]:
    """The functions among a layer's methods, as its classes have them."""
    found: dict[str, Any] = {}
    for cls in reversed(type(layer).__mro__):
        found.update(vars(cls))
    return {name: f for name, f in found.items() if isinstance(f, KIND) and name not in vars(layer)}
