"""What becomes of a configuration when features join: the decisions, which backends then carry out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flix.core.config import FlixConfig
from flix.core.errors import RankError
from flix.core.registry import Feature


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
