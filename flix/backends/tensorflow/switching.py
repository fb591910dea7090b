"""Features switched off for a while, and features that train no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flix.backends.tensorflow._base import flix_layers
from flix.backends.tensorflow._change import forget
from flix.backends.tensorflow.model import FlixModel, require_adapted
from flix.core.adapter.sharing import chosen_features


@contextmanager
def disable(model: FlixModel) -> Iterator[None]:
    """Inside, an adapted model is its base: no feature acts, and no routing is needed or looked at.

    It switches the model itself, for every thread. What ``fit``, ``evaluate`` and ``predict`` had compiled is dropped
    at both ends and traced anew; a ``tf.function`` made by hand keeps the state that it was traced in, so make one for
    each. Contexts may nest.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "disable")
    holders: list[Any] = [model, *(layer for _, layer in flix_layers(model.base))]
    before = [(holder, holder.flix_enabled) for holder in holders]
    _switch([(holder, False) for holder in holders], model)
    try:
        yield
    finally:
        _switch(before, model)


def _switch(states: list[tuple[Any, bool]], model: FlixModel) -> None:
    for holder, enabled in states:
        holder.flix_enabled = enabled
    forget(model)


def freeze(model: FlixModel, features: Any) -> None:
    """Let these features of an adapted model train no more; the others stay as they are.

    A compiled model stays compiled, and its optimizer's state valid. ``.keras`` files keep what is frozen.

    Args:
        model: an adapted model.
        features: ``[(group, name), ...]`` or ``{group: name or names}``.

    Raises:
        FeatureError: an unknown feature.
        TargetError: the model is not adapted.
    """
    _set_frozen(model, features, True, "freeze")


def thaw(model: FlixModel, features: Any = None) -> None:
    """Let these features of an adapted model train again; default: all of them.

    Raises:
        FeatureError: an unknown feature.
        TargetError: the model is not adapted.
    """
    _set_frozen(model, features, False, "thaw")


def _set_frozen(model: FlixModel, features: Any, value: bool, what: str) -> None:
    registry = require_adapted(model, what).registry
    chosen = registry.live if features is None else chosen_features(registry, features)
    ids = {registry.id(*feature) for feature in chosen}
    for _, layer in flix_layers(model.base):
        before = set(layer.flix_frozen)
        frozen = tuple(sorted(before | ids if value else before - ids))
        layer.set_config(layer.flix_config, layer.flix_layout, frozen)
    forget(model)
