"""What a forward runs under, per thread: a model's call puts it in force, its layers read it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from flix.core.features.registry import FeatureRegistry


class Forward(threading.local):
    """The forward that is running on this thread.

    Attributes:
        routing: the routing in force, in the framework's own form; None outside a forward.
        present: JAX: the features whose rows the layers hold, where they were gathered; else None.
    """

    routing: Any = None
    present: Any = None

    @contextmanager
    def under(self, **values: Any) -> Iterator[None]:
        """Run with these attributes on this thread."""
        previous = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(previous)


def by_hand(
    current: Forward, make: Callable[[FeatureRegistry, Any, Any], Any]
) -> Callable[..., AbstractContextManager[None]]:
    """A backend's ``route``, from its own checks of routing."""

    @contextmanager
    def route(registry: FeatureRegistry, features: Any, weights: Any = None) -> Iterator[None]:
        """Run methods of an adapted model other than its call, or adapted layers by hand, under one routing.

        Args:
            registry: the registry of the model or the layers.
            features: int ``[B, W]`` or ``[B, T, W]``.
            weights: float in that shape, or None for 1.

        Raises:
            RoutingError: routing that breaks a rule.
        """
        with current.under(routing=make(registry, features, weights)):
            yield

    return route
