"""What becomes of a model's features when some join, leave or are renamed: the decisions, which backends carry out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import Adapter, LayerShape
from flix.core.adapter.sharing import chosen_features, plan_combination, select_features
from flix.core.config.config import FlixConfig
from flix.core.errors import RankError
from flix.core.features.names import Feature


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


def plan_growth(
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
    names = [init_from] if isinstance(init_from, str) else list(init_from or ())
    for origin in names:
        config.registry.id(group, origin)
    origins = tuple((group, origin) for origin in names)
    if rank is None:
        if not origins:
            raise RankError("add_feature needs a rank, or init_from to take it from")
        rank = max(config.ranks[origin] for origin in origins)  # type: ignore[index]
    grown = config.with_feature(group, name, rank=rank, alpha=alpha, implies=implies)
    return Growth(grown, (group, name), origins)


@dataclass(frozen=True, eq=False)
class Change:
    """What a backend is to make of a model's features; everything not said stays bit for bit.

    Attributes:
        config: the configuration afterwards.
        kept: features whose values stay, by their name afterwards, with their name before.
        source: where the values of all other features come from; None if there are none.
        layers: layers that become adapted ones, in which the kept features have rank 0.
    """

    config: FlixConfig
    kept: Mapping[Feature, Feature]
    source: Adapter | None = None
    layers: Mapping[str, LayerShape] | None = None

    @property
    def arriving(self) -> tuple[Feature, ...]:
        """The features whose values come from ``source``, in the order of their ids."""
        return tuple(f for f in self.config.registry.live if f not in self.kept)

    def pair(self, path: str, feature: Feature) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """A ``[r, d_in]`` and B ``[d_out, r]`` of an arriving feature in a layer; None where it has no update."""
        if not self.config.rank(path, feature) or self.source is None:
            return None
        a, b = self.source.pair(path, feature)
        return np.array(a), np.array(b)


def plan_removal(config: FlixConfig, group: str, name: str) -> Change:
    """One feature less; its id stays reserved.

    Raises:
        FeatureError: no such feature, or the last of its group.
    """
    after = config.without_feature(group, name)
    return Change(after, {f: f for f in after.registry.live})


def plan_renaming(config: FlixConfig, group: str, name: str, new: str) -> Change:
    """Another name for one feature; its id and values stay.

    Raises:
        FeatureError: no such feature, or a new name that is ill-formed or taken.
    """
    after = config.with_renamed(group, name, new)
    before = zip(after.registry.features, config.registry.features, strict=True)
    return Change(after, {f: old for f, old in before if f in after.registry})


def plan_joining(
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
    plan = plan_combination({"the model": present, "the adapter": arriving}, conflicts)
    return Change(
        config=plan.config,
        kept={feature: feature for feature, owner in plan.owners.items() if owner == 0},
        source=arriving,
        layers={path: s for path, s in plan.layers.items() if path not in present.layers},
    )
