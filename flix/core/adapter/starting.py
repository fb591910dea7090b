"""An adapter that goes on from another one: what the earlier one has stays, what is new joins it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flix.core.adapter.adapter import Adapter
from flix.core.config.config import FlixConfig
from flix.core.errors import AdapterError, ConfigError, listed, shown
from flix.core.features.names import Feature, written

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
        FeatureError: implications that form a cycle together.
    """
    for name in _SAME:
        if (mine := getattr(start, name)) != (wanted := getattr(asked, name)):
            raise ConfigError(
                f"{name} is {shown(mine)} in the adapter to start from, and {shown(wanted)} here; an adapter's values mean "
                f"the same only with the same {name}"
            )
    before, after = _implied(start), _implied(asked)
    for source in before.keys() & after.keys():
        if {*before[source]} != {*after[source]}:
            raise ConfigError(
                f"{written(source)} implies {listed(map(written, before[source]))} in the adapter to start from, and "
                f"{listed(map(written, after[source]))} here; a feature's implications stay as they are"
            )
    registry = start.registry.union(asked.registry)
    known = {*start.registry.live}
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


def _implied(config: FlixConfig) -> Mapping[Feature, tuple[Feature, ...]]:
    return config.registry._implies


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
