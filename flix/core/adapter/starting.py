"""An adapter that goes on from another one: what the earlier one has stays, what is new joins it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from flix.core.adapter.adapter import Adapter
from flix.core.config.config import FlixConfig
from flix.core.errors import AdapterError, ConfigError, listed, shown
from flix.core.features.names import EVERY, Feature, written
from flix.core.features.registry import FeatureRegistry

#: Of a configuration, what decides which numbers an adapter's values stand for.
_SAME = ("scaling", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


def grown(start: FlixConfig, asked: FlixConfig) -> FlixConfig:
    """The configuration of an adapter that starts from another one.

    Features of the earlier adapter keep their ids, ranks and alphas. Dropout, the seed and the like are as asked.

    Args:
        start: the configuration of the earlier adapter.
        asked: the one that the new data and settings ask for.

    Raises:
        ConfigError: both differ in what the earlier adapter's values depend on, or in what a feature implies.
    """
    for name in _SAME:
        if (mine := getattr(start, name)) != (wanted := getattr(asked, name)):
            raise ConfigError(
                f"{name} is {shown(mine)} in the adapter to start from, and {shown(wanted)} here; an adapter's values mean "
                f"the same only with the same {name}"
            )
    known = {*start.registry.live}
    _check_implied(start.registry, asked.registry, known | {(group, EVERY) for group, _ in known})
    registry = start.registry.union(asked.registry)
    return replace(
        start,
        registry=registry,
        ranks={f: (start if f in known else asked).ranks[f] for f in registry.live},  # type: ignore[index]
        alpha=_alphas(start, asked),
        feature_dropout=asked.feature_dropout,
        lora_dropout=asked.lora_dropout,
        unknown=asked.unknown,
        seed=asked.seed,
        init=asked.init,
    )


def _check_implied(
    start: FeatureRegistry, asked: FeatureRegistry, known: Collection[Feature]
) -> None:
    """Refuse implications that would change what the earlier adapter's features are."""
    for source, targets in asked._implies.items():
        before = start._implies.get(source, ())
        if source in known and {*before} != {*targets}:
            raise ConfigError(
                f"{written(source)} implies {listed(map(written, before)) if before else 'nothing'} in the adapter to start from, and "
                f"{listed(map(written, targets))} here; a feature's implications stay as they are"
            )


def _alphas(start: FlixConfig, asked: FlixConfig) -> float | Mapping[Feature, float] | None:
    """One alpha for all features if both have the same; otherwise each feature's own."""
    if start.alpha == asked.alpha and not isinstance(start.alpha, Mapping):
        return start.alpha
    known = {*start.registry.live}
    found = {}
    for feature in start.registry.union(asked.registry).live:
        alpha = (start if feature in known else asked).general_alpha(feature)
        if alpha is not None:
            found[feature] = alpha
    return found


def started(fresh: Adapter, start: Adapter) -> Adapter:
    """The values to start with: those of the earlier adapter, and fresh ones for the features that it lacks.

    Args:
        fresh: the new adapter with all its values fresh.
        start: the earlier adapter.

    Raises:
        AdapterError: they adapt other layers, or layers of other sizes.
    """
    for path, shape in start.layers.items():
        if fresh.layers.get(path) != shape:
            there = f"is {fresh.layers[path]}" if path in fresh.layers else "is not adapted"
            raise AdapterError(
                f"layer {path!r} of the adapter to start from is {shape}, and here it {there}"
            )
    if more := [path for path in fresh.layers if path not in start.layers]:
        raise AdapterError(f"the adapter to start from does not adapt {listed(more, 5)}")
    return Adapter(fresh.config, fresh.layers, {**fresh.tensors, **start.tensors}, start.heads)
