"""Features switched off for a while, and features that train no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from flax import nnx

from flix.backends.jax.bank import Bank, LayerBank
from flix.backends.jax.files import Source, config_and_bank
from flix.backends.jax.model import flix_layers, require_adapted
from flix.core.adapter.sharing import chosen_features
from flix.core.features.registry import FeatureRegistry


@contextmanager
def disable(model: nnx.Module) -> Iterator[None]:
    """Inside, an adapted nnx model is its base: no feature acts, and no routing is needed or looked at.

    The state is static, so that ``nnx.jit`` traces a function of the model anew. What is traced once for all keeps the
    state that it was traced in: ``nnx.cached_partial``, and compiled functions that close over the model instead of
    taking it as an argument. Contexts may nest.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "disable")
    holders: list[Any] = [model, *(layer for _, layer in flix_layers(model))]
    switched = [holder for holder in holders if holder.flix_enabled]
    for holder in switched:
        holder.flix_enabled = False
    try:
        yield
    finally:
        for holder in switched:
            del holder.flix_enabled  # the class's counts again


def freeze(source: Source | Bank, features: Any) -> Any:
    """Let these features train no more; the others stay as they are.

    Frozen features get no gradient, and flix's optimizers leave them alone; state of an optimizer stays valid.

    Args:
        source: an adapted nnx model, which is changed in place; ``(config, bank)``; or a bank.
        features: ``[(group, name), ...]`` or ``{group: name or names}``.

    Returns:
        None for a model, else a source of the same kind.

    Raises:
        FeatureError: an unknown feature.
        TargetError: the model is not adapted.
    """
    return _set_frozen(source, features, True, "freeze")


def thaw(source: Source | Bank, features: Any = None) -> Any:
    """Let these features train again; default: all of them. Otherwise as :func:`freeze`.

    Raises:
        FeatureError: an unknown feature.
        TargetError: the model is not adapted.
    """
    return _set_frozen(source, features, False, "thaw")


def _set_frozen(source: Any, features: Any, value: bool, what: str) -> Any:
    if isinstance(source, dict) and all(isinstance(x, LayerBank) for x in source.values()):
        return _frozen_bank(source, features, value)
    config, bank = config_and_bank(source, what)
    if isinstance(source, tuple):
        return config, _frozen_bank(bank, features, value)
    ids = _ids(config.registry, features)
    for _, layer in flix_layers(source):
        spec = layer.flix_spec
        layer.flix_spec = replace(spec, frozen=spec.frozen | ids if value else spec.frozen - ids)
    return None


def _frozen_bank(bank: Bank, features: Any, value: bool) -> Bank:
    found = {}
    for path, layer in bank.items():
        ids, spec = _ids(layer.spec.registry, features), layer.spec
        frozen = spec.frozen | ids if value else spec.frozen - ids
        found[path] = LayerBank(layer.A, layer.B, replace(spec, frozen=frozen))
    return found


def _ids(registry: FeatureRegistry, features: Any) -> frozenset[int]:
    chosen = registry.live if features is None else chosen_features(registry, features)
    return frozenset(registry.id(*feature) for feature in chosen)
