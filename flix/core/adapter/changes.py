"""What becomes of a model's features when some join, leave or are renamed: the decisions, which backends carry out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from flix.core.adapter.adapter import Adapter, LayerShape, Pair
from flix.core.adapter.initial import initial_pairs
from flix.core.adapter.lowrank import resized_mean
from flix.core.adapter.sharing import chosen_features, combining, select_features
from flix.core.config.config import FlixConfig
from flix.core.errors import FeatureError, RankError, shown
from flix.core.features.names import Feature

V = TypeVar("V")


def fresh_pairs(config: FlixConfig, path: str, shape: LayerShape) -> dict[Feature, Pair]:
    """The pairs that a layer starts with (docs/specification.md §1.3), by feature; without those of rank 0."""
    ranks = {feature: config.rank(path, feature) for feature in config.registry.live}
    sizes = {"d_in": shape.d_in, "d_out": shape.d_out, "experts": shape.experts}
    made = initial_pairs(seed=config.seed, layer=path, ranks=ranks, init=config.init, **sizes)
    return {**made}


@dataclass(frozen=True, eq=False)
class Change:
    """What a backend is to make of a model's features; everything not said stays bit for bit.

    Attributes:
        config: the configuration afterwards.
        kept: features whose values stay, by their name afterwards, with their name before.
        arriving: the pairs of all other features, by feature and layer; not to be written to.
        layers: layers that become adapted ones, in which the kept features have rank 0.
    """

    config: FlixConfig
    kept: Mapping[Feature, Feature]
    arriving: Mapping[Feature, Mapping[str, Pair]] = field(default_factory=dict)
    layers: Mapping[str, LayerShape] = field(default_factory=dict)

    def keep(self, table: Mapping[Feature, V]) -> dict[Feature, V]:
        """What a table by feature holds of kept features, under their names afterwards."""
        return {f: table[old] for f, old in self.kept.items() if old in table}

    def pairs(self, path: str) -> dict[Feature, Pair]:
        """The arriving features' pairs in a layer; those without an update there are left out."""
        return {f: layers[path] for f, layers in self.arriving.items() if path in layers}


@dataclass(frozen=True)
class Growth:
    """A feature that joins.

    Attributes:
        config: the configuration with the feature; ids of the others stay.
        feature: the feature.
        origins: the features whose mean update it starts from; none for fresh values.
    """

    config: FlixConfig
    feature: Feature
    origins: tuple[Feature, ...]

    def change(
        self, layers: Mapping[str, LayerShape], pairs: Mapping[str, Mapping[Feature, Pair]]
    ) -> Change:
        """The change that the feature's joining is.

        Args:
            layers: the model's adapted layers.
            pairs: the origins' pairs, by layer and feature.
        """
        arriving = {
            path: self._pair(path, shape, pairs.get(path, {}))
            for path, shape in layers.items()
            if self.config.rank(path, self.feature)
        }
        kept = {f: f for f in self.config.registry.live if f != self.feature}
        return Change(self.config, kept, {self.feature: arriving})

    def _pair(self, path: str, shape: LayerShape, pairs: Mapping[Feature, Pair]) -> Pair:
        rank = self.config.rank(path, self.feature)
        fresh = initial_pairs(
            seed=self.config.seed,
            layer=path,
            ranks={self.feature: rank},
            d_in=shape.d_in,
            d_out=shape.d_out,
            experts=shape.experts,
            init=self.config.init,
        )
        known = [origin for origin in self.origins if origin in pairs]
        if not known:
            return fresh[self.feature]
        scales = [self.config.scale(path, f) for f in known]
        scale, count = self.config.scale(path, self.feature), len(self.origins)
        sources = [tuple(side.astype(np.float64) for side in pairs[f]) for f in known]
        a = fresh[self.feature][0]
        if not shape.experts:
            return resized_mean(sources, scales, a, scale, count)  # type: ignore[arg-type]
        each = [
            resized_mean([(s[0][e], s[1][e]) for s in sources], scales, a[e], scale, count)
            for e in range(shape.experts)
        ]
        return np.stack([pair[0] for pair in each]), np.stack([pair[1] for pair in each])


def growing(
    config: FlixConfig,
    group: str,
    name: str,
    rank: int | None = None,
    *,
    init_from: str | Sequence[str] | None = None,
    alpha: float | None = None,
    implies: Sequence[Feature] = (),
) -> Growth:
    """One feature more.

    Args:
        config: the model's configuration.
        group: a group of its registry.
        name: the new feature.
        rank: its rank; default: the largest of the origins'.
        init_from: features of the group to start from, or None.
        alpha: its alpha; default: the configuration's rule.
        implies: features that it implies.

    Raises:
        FeatureError: an unknown group or origin, or a name that exists already.
        RankError: no rank and nothing to take it from.
    """
    names = [init_from] if isinstance(init_from, str) else init_from or ()
    if not isinstance(names, Iterable):
        raise FeatureError(
            f"init_from must be a name or names of group {group!r}, got {shown(names)}"
        )
    registry = config.registry
    origins = tuple(registry.features[registry.id(group, origin)] for origin in names)
    if rank is None:
        if not origins:
            raise RankError("add_feature needs a rank, or init_from to take it from")
        rank = max(config.ranks[origin] for origin in origins)  # type: ignore[index]
    grown = config.with_feature(group, name, rank=rank, alpha=alpha, implies=implies)
    feature = grown.registry.features[grown.registry.id(group, name)]
    return Growth(grown, feature, origins)


def removing(config: FlixConfig, group: str, name: str) -> Change:
    """One feature less; its id stays reserved.

    Raises:
        FeatureError: no such feature, or the last of its group.
    """
    after = config.without_feature(group, name)
    return Change(after, {f: f for f in after.registry.live})


def renaming(config: FlixConfig, group: str, name: str, new: str) -> Change:
    """Another name for one feature; its id and values stay.

    Raises:
        FeatureError: no such feature, or a new name that is ill-formed or taken.
    """
    after = config.with_renamed(group, name, new)
    before = zip(after.registry.features, config.registry.features, strict=True)
    return Change(after, {f: old for f, old in before if f in after.registry})


def joining(
    present: Adapter, arriving: Adapter, features: object = None, *, conflicts: str = "error"
) -> Change:
    """Features of another adapter join a model's.

    Args:
        present: the model's own.
        arriving: the other adapter, its layers renamed to the model's.
        features: those that are wanted (what they imply comes, too); default: all.
        conflicts: see :func:`flix.combine_adapters`; the model's are the earlier ones.

    Raises:
        FeatureError: an unknown feature.
        AdapterError: features that differ, or a layer of different sizes.
    """
    if features is not None:
        arriving = select_features(arriving, chosen_features(arriving.config.registry, features))
    both = combining({"the model": present, "the adapter": arriving}, conflicts)
    come = [feature for feature, owner in both.owners.items() if owner == 1]
    return Change(
        config=both.config,
        kept={feature: feature for feature, owner in both.owners.items() if owner == 0},
        arriving={
            f: {p: arriving.pair(p, f) for p in arriving.layers if arriving.config.rank(p, f)}
            for f in come
        },
        layers={path: s for path, s in both.layers.items() if path not in present.layers},
    )
