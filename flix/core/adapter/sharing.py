"""Adapters taken apart and put together: one language's file without the rest, several people's files as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import Adapter, LayerShape, tensor_name
from flix.core.adapter.base import differing
from flix.core.adapter.described import Base
from flix.core.config.config import FlixConfig
from flix.core.config.overrides import nested
from flix.core.config.targets import exactly
from flix.core.errors import AdapterError, ConfigError, FeatureError, listed, shown
from flix.core.features.names import EVERY, Feature, pair, written
from flix.core.features.registry import FeatureRegistry

CONFLICTS = ("error", "keep", "replace")


def chosen_features(registry: FeatureRegistry, features: object) -> tuple[Feature, ...]:
    """Features as users name them, ``[(group, name), ...]`` or ``{group: name or names}``, checked.

    Raises:
        FeatureError: another form, an unknown feature, or none at all.
    """
    found: list[Feature] = []
    if isinstance(features, Mapping):
        named = {g: [some] if isinstance(some, str) else some for g, some in features.items()}
        if all(isinstance(some, Iterable) for some in named.values()):
            found = [(group, name) for group, some in named.items() for name in some]
    elif isinstance(features, Iterable) and not isinstance(features, str):
        found = [pair(feature) for feature in features]
    if not found:
        raise FeatureError(
            "features are chosen as [(group, name), ...] or {group: name or names}, got "
            f"{features!r}"
        )
    return tuple(registry.features[registry.id(*feature)] for feature in found)


def select_features(adapter: Adapter, features: object) -> Adapter:
    """An adapter of some features and of those that they imply; other features and trained heads are left out.

    Its ids are its own. Values are not copied.

    Args:
        adapter: the adapter.
        features: ``[(group, name), ...]`` or ``{group: name or names}``.

    Raises:
        FeatureError: an unknown feature, or none at all.
    """
    config = adapter.config.subset(chosen_features(adapter.config.registry, features))
    chosen = _with_config(adapter, config, {f: f for f in config.registry.features})
    return replace(chosen, heads={})


def rename_feature(adapter: Adapter, group: str, name: str, new: str) -> Adapter:
    """The adapter with another name for one feature; its id and values stay.

    Raises:
        FeatureError: no such feature, or a new name that is ill-formed or taken.
    """
    config = adapter.config.with_renamed(group, name, new)
    old = dict(zip(config.registry.features, adapter.config.registry.features, strict=True))
    return _with_config(adapter, config, old)


def remove_feature(adapter: Adapter, group: str, name: str) -> Adapter:
    """The adapter without one feature; the others keep their ids.

    Raises:
        FeatureError: no such feature, or the last of its group.
    """
    config = adapter.config.without_feature(group, name)
    return _with_config(adapter, config, {f: f for f in config.registry.live})


def _with_config(
    adapter: Adapter, config: FlixConfig, before: Mapping[Feature, Feature]
) -> Adapter:
    """The adapter's values under a configuration whose features had other names before."""
    tensors = {
        tensor_name(path, part, feature): adapter.tensors[tensor_name(path, part, old)]
        for path in adapter.layers
        for feature, old in before.items()
        if config.rank(path, feature)
        for part in "AB"
    }
    return Adapter(config, adapter.layers, tensors, adapter.heads, adapter.base)


@dataclass(frozen=True)
class Combination:
    """What several adapters come to together, without their values.

    Attributes:
        config: the configuration of all features. Ids of the first adapter stay.
        layers: the layers of all.
        owners: the number of the adapter that each live feature's values come from.
    """

    config: FlixConfig
    layers: Mapping[str, LayerShape]
    owners: Mapping[Feature, int]


def combine_adapters(
    adapters: Mapping[str, Adapter] | Sequence[Adapter], *, conflicts: str = "error"
) -> Adapter:
    """One adapter with the features of several, which may come from different people.

    If several adapters have a feature, it must be the same in all of them, value for value; otherwise ``conflicts``
    decides. Adapters need not adapt the same layers: a feature has rank 0 in layers that its own adapter does not
    have. Feature dropout, the policy for unknown features and the seed are those of the first adapter. Trained heads
    are left out. All adapters must have been trained on one base model. If two adapt the same layers and name their
    base, this is checked.

    Args:
        adapters: two or more; a mapping gives them names, which messages use.
        conflicts: ``"error"``; ``"keep"`` uses the earlier adapter; ``"replace"`` uses the later one.

    Raises:
        AdapterError: a feature that differs between adapters (all are named, with what differs), a layer of different
            sizes, or another base.
        ConfigError: an unknown policy.
    """
    named = _named(adapters)
    together = combining(named, conflicts)
    sources = list(named.values())
    tensors: dict[str, NDArray[Any]] = {}
    for path in together.layers:
        for feature, owner in together.owners.items():
            if together.config.rank(path, feature):
                for part in "AB":
                    name = tensor_name(path, part, feature)
                    tensors[name] = sources[owner].tensors[name]
    return Adapter(together.config, together.layers, tensors, base=_joined_base(named))


def _named(adapters: Mapping[str, Adapter] | Sequence[Adapter]) -> dict[str, Adapter]:
    named: dict[str, Adapter] = {}
    if isinstance(adapters, Mapping):
        named = dict(adapters)
    elif isinstance(adapters, Iterable):
        named = {f"adapter {number}": adapter for number, adapter in enumerate(adapters)}
    if not named or not all(isinstance(adapter, Adapter) for adapter in named.values()):
        raise AdapterError(
            f"adapters to combine are [adapter, ...] or {{name: adapter}}, at least one, got {shown(adapters)}"
        )
    return named


def combining(named: Mapping[str, Adapter], conflicts: str = "error") -> Combination:
    """How adapters come together: see :func:`combine_adapters`."""
    if conflicts not in CONFLICTS:
        raise ConfigError(f"conflicts must be one of {', '.join(CONFLICTS)}; got {conflicts!r}")
    names, adapters = list(named), list(named.values())
    layers = _joined_layers(named)
    owners: dict[Feature, int] = {}
    clashes: list[str] = []
    for number, adapter in enumerate(adapters):
        for feature in adapter.config.registry.live:
            if feature not in owners:
                owners[feature] = number
                continue
            first = owners[feature]
            what = difference(adapters[first], adapter, feature)
            if what and conflicts == "replace":
                owners[feature] = number
            elif what:
                clashes.append(f"{written(feature)} ({names[first]} and {names[number]}: {what})")
    if clashes and conflicts == "error":
        raise AdapterError(
            f"{len(clashes)} feature(s) differ between adapters: {listed(clashes, 5)}. Choose "
            "conflicts='keep' (the earlier counts) or 'replace' (the later), or rename one with "
            "rename_feature"
        )
    registry = _joined_registry([a.config.registry for a in adapters], owners)
    config = _joined_config([a.config for a in adapters], adapters, registry, owners, layers)
    return Combination(config, layers, owners)


def difference(first: Adapter, second: Adapter, feature: Feature) -> str:
    """In words, how a feature differs between two adapters; empty if it does not."""
    registries = (first.config.registry, second.config.registry)
    if _said_of(registries[0], feature) != _said_of(registries[1], feature):
        # Said in other words, the same may follow. (Where the words agree, so does what follows, or another feature
        # differs: nothing is followed, since a chain of features would be followed from each of them.)
        implied = [{r.features[i] for i in r.implied(r.id(*feature))} for r in registries]
        if implied[0] != implied[1]:
            return "it implies other features"
    for path in {**first.layers, **second.layers}:
        ranks = [a.config.rank(path, feature) if path in a.layers else 0 for a in (first, second)]
        if ranks[0] != ranks[1]:
            return f"ranks {ranks[0]} and {ranks[1]} in layer {path!r}"
        if not ranks[0]:
            continue
        scales = [a.config.scale(path, feature) for a in (first, second)]
        if scales[0] != scales[1]:
            return f"scales {scales[0]:g} and {scales[1]:g} in layer {path!r}"
        for part, one, two in zip(
            "AB", first.pair(path, feature), second.pair(path, feature), strict=True
        ):
            if not np.array_equal(one, two):
                return f"other values in {part} of layer {path!r}"
    return ""


def _joined_base(named: Mapping[str, Adapter]) -> Base | None:
    """The base that all adapters say; its fingerprint where all adapt the same layers.

    Raises:
        AdapterError: adapters of the same layers that say different bases.
    """
    adapters = list(named.values())
    first = adapters[0]
    same = [dict(a.layers) == dict(first.layers) for a in adapters]
    for (name, other), alike in zip(named.items(), same, strict=True):
        if alike and differing(first.base, other.base) is not None:
            raise AdapterError(
                f"adapters are combined on one base: {next(iter(named))} was trained on {first.base}, {name} on {other.base}"
            )
    bases = [a.base or Base() for a in adapters]
    names, revisions = {b.name for b in bases}, {b.revision for b in bases}
    prints = {b.fingerprint for b in bases}
    joined = Base(
        name=names.pop() if len(names) == 1 else None,
        revision=revisions.pop() if len(revisions) == 1 else None,
        fingerprint=prints.pop() if len(prints) == 1 and all(same) else None,
    )
    return None if joined == Base() else joined


def _said_of(registry: FeatureRegistry, feature: Feature) -> tuple[tuple[Feature, ...], ...]:
    """What is declared that a feature implies, for itself and for its group."""
    return registry.declared(feature), registry.declared((feature[0], EVERY))


def _joined_layers(named: Mapping[str, Adapter]) -> dict[str, LayerShape]:
    layers: dict[str, LayerShape] = {}
    origin: dict[str, str] = {}
    for name, adapter in named.items():
        for path, shape in adapter.layers.items():
            known = layers.setdefault(path, shape)
            if known != shape:
                raise AdapterError(
                    f"layer {path!r} is {known} in {origin[path]} and {shape} in {name}; adapters that are combined "
                    "belong to one base model"
                )
            origin.setdefault(path, name)
    return layers


def _joined_registry(
    registries: Sequence[FeatureRegistry], owners: Mapping[Feature, int]
) -> FeatureRegistry:
    """All features; each implies what it implied where its values come from."""
    joined = registries[0]
    for registry in registries[1:]:
        # Without implications: they are put together below, when every feature is there.
        joined = joined.union(registry.with_implications({}))
    declared: dict[Feature, tuple[Feature, ...]] = {}
    groups = [{*registry.groups} for registry in registries]
    for group in joined.groups:
        rules = {
            registry.declared((group, EVERY))
            for registry, present in zip(registries, groups, strict=True)
            if group in present
        }
        every = rules.pop() if len(rules) == 1 else ()
        if every:
            declared[(group, EVERY)] = every
        for feature in ((group, name) for name in joined.names(group)):
            own = registries[owners[feature]]
            more = own.declared((group, EVERY)) if not every else ()
            if found := tuple(dict.fromkeys((*own.declared(feature), *more))):
                declared[feature] = found
    return joined.with_implications(declared)


def _joined_config(
    configs: Sequence[FlixConfig],
    adapters: Sequence[Adapter],
    registry: FeatureRegistry,
    owners: Mapping[Feature, int],
    layers: Mapping[str, LayerShape],
) -> FlixConfig:
    first = configs[0]
    ranks = {f: int(configs[i].ranks[f]) for f, i in owners.items()}  # type: ignore[index]
    alphas = _general_alphas(configs, adapters, owners)
    others: dict[tuple[tuple[Feature, int], ...], list[str]] = {}
    scaled: dict[tuple[tuple[Feature, float], ...], list[str]] = {}
    for path in layers:
        here = {
            f: configs[i].rank(path, f) if path in adapters[i].layers else 0
            for f, i in owners.items()
        }
        if unlike := tuple((f, r) for f, r in here.items() if r != ranks[f]):
            others.setdefault(unlike, []).append(path)
        wanted = {f: _alpha(configs[owners[f]], path, f, first.scaling) for f in here if here[f]}
        if apart := tuple(
            (f, a) for f, a in wanted.items() if a is not None and a != alphas.get(f)
        ):
            scaled.setdefault(apart, []).append(path)
    same_layers = all(list(a.layers) == list(layers) for a in adapters)
    return replace(
        first,
        registry=registry,
        ranks=ranks,
        alpha=alphas or None,
        rank_pattern={exactly(paths): nested(dict(unlike)) for unlike, paths in others.items()},
        alpha_pattern={exactly(paths): nested(dict(unlike)) for unlike, paths in scaled.items()},
        target_modules=first.target_modules if same_layers else tuple(layers),
        exclude_modules=first.exclude_modules if same_layers else (),
    )


def _general_alphas(
    configs: Sequence[FlixConfig], adapters: Sequence[Adapter], owners: Mapping[Feature, int]
) -> dict[Feature, float]:
    """The alphas of features that have one, under the first configuration's scaling; of most layers, if they differ."""
    scaling = configs[0].scaling
    found: dict[Feature, float] = {}
    for f, i in owners.items():
        alpha, paths = configs[i].general_alpha(f), adapters[i].layers
        if configs[i].scaling != scaling:
            each = [_alpha(configs[i], p, f, scaling) for p in paths if configs[i].rank(p, f)]
            alpha = max(each, key=each.count, default=None)  # type: ignore[arg-type, unused-ignore]
        if alpha is not None:
            found[f] = alpha
    return found


def _alpha(config: FlixConfig, path: str, feature: Feature, scaling: str) -> float | None:
    """The alpha that keeps a feature's scale in a layer under this scaling; None for alpha = rank."""
    if config.scaling == scaling:
        return config.layer_alpha(path, feature)
    rank = config.rank(path, feature)
    return config.scale(path, feature) * (rank if scaling == "lora" else rank**0.5)
