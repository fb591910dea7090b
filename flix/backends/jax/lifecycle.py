"""Features over a model's life: a new language or task joins a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from flix.backends.jax.bank import Bank, LayerBank, make_spec, pack
from flix.backends.jax.files import Source, config_and_bank
from flix.backends.jax.model import flix_layers, set_config
from flix.core.config import FlixConfig
from flix.core.factors import resized_mean
from flix.core.initial import initial_a, initial_b
from flix.core.lifecycle import plan_growth
from flix.core.registry import Feature


def add_feature(
    source: Source,
    group: str,
    name: str,
    rank: int | None = None,
    *,
    init_from: str | Sequence[str] | None = None,
    freeze_others: bool = True,
    alpha: float | None = None,
    implies: Sequence[Feature] = (),
) -> Any:
    """Add one feature; ids and values of the others stay. An adapted nnx model is changed in place.

    The tables grow, so optimizer state made before does not fit any more: make a new optimizer. Frozen features get no
    gradient, and ``FlixOptimizer``, ``mask_absent`` and ``sparse_update`` leave them bit-identical; a bare optax
    optimizer with weight decay would shrink them.

    Args:
        source: an adapted model, or ``(config, bank)``.
        group: a group of its registry.
        name: the new feature.
        rank: its rank in every layer; default: that of ``init_from``.
        init_from: None for fresh values (the update starts at zero), or features of the group whose update (for
            several: the mean of whose updates) the new one starts from, as near as its rank allows.
        freeze_others: let only the new feature train.
        alpha: its alpha; default: the configuration's rule.
        implies: features that it implies.

    Returns:
        ``(config, bank)`` for ``(config, bank)``; None for a model.

    Raises:
        FeatureError: an unknown group or source, or a name that exists already.
        RankError: no rank and nothing to take it from.
        TargetError: the model is not adapted.
    """
    config, bank = config_and_bank(source, "add_feature")
    growth = plan_growth(
        config, group, name, rank, init_from=init_from, alpha=alpha, implies=implies
    )
    grown, feature, origins = growth.config, growth.feature, growth.origins
    new = _grown(grown, bank, feature, origins, freeze_others)
    if isinstance(source, tuple):
        return grown, new
    for path, layer in flix_layers(source):
        layer.put(new[path])
    set_config(source, grown)
    return None


def _grown(
    grown: FlixConfig,
    bank: Bank,
    feature: Feature,
    origins: Sequence[Feature],
    freeze_others: bool,
) -> Bank:
    result = {}
    for path, layer in bank.items():
        old = frozenset(range(len(layer.spec.ranks))) if freeze_others else layer.spec.frozen
        spec = make_spec(grown, path, layer.spec.shape, old)
        pairs: dict[Feature, tuple[Any, Any]] = {f: (a, b) for f, a, b in layer.pairs()}
        if grown.rank(path, feature):
            pairs[feature] = _new_pair(grown, layer, feature, origins)
        result[path] = pack(spec, pairs, layer.A.dtype)
    return result


def _new_pair(
    grown: FlixConfig, layer: LayerBank, feature: Feature, origins: Sequence[Feature]
) -> tuple[Any, Any]:
    path, shape = layer.spec.path, layer.spec.shape
    rank = grown.rank(path, feature)
    fresh = initial_a(
        seed=grown.seed,
        layer=path,
        group=feature[0],
        feature=feature[1],
        rank=rank,
        d_in=shape.d_in,
    )
    known = [origin for origin in origins if grown.rank(path, origin)]
    if not known:
        return fresh, initial_b(rank=rank, d_out=shape.d_out)
    pairs = [layer.pair(*origin) for origin in known]
    return resized_mean(
        [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs],
        [grown.scale(path, origin) for origin in known],
        fresh,
        grown.scale(path, feature),
        len(origins),
    )


def thaw(model: nnx.Module) -> None:
    """Let every feature of an adapted model train again.

    Raises:
        TargetError: the model is not adapted.
    """
    from dataclasses import replace

    config_and_bank(model, "thaw")
    for _, layer in flix_layers(model):
        layer.flix_spec = replace(layer.flix_spec, frozen=frozenset())
