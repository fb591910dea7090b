"""Known features in the place of unknown ones: a language's relatives, by a family tree or by a typology."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flix.core.checks import whole
from flix.core.errors import ConfigError, FeatureError, listed, shown
from flix.core.features.names import normal_name
from flix.core.features.registry import FeatureRegistry


def by_parents(
    registry: FeatureRegistry, group: str, parents: Mapping[str, str]
) -> dict[str, list[str]]:
    """For each name in a tree that has no feature, find the nearest names that have one.

    These are the known names under the lowest ancestor that has any (or the ancestor itself, if it is known). ::

        registry.encode(rows, unknown=flix.by_parents(registry, "language", {"xho": "nguni", "zul": "nguni", ...}))

    Args:
        registry: the features.
        group: the group.
        parents: the parent of each name; names that are not features, such as families, may occur anywhere.

    Returns:
        A mapping for ``encode(..., unknown=)``; names without known relatives are left out.

    Raises:
        FeatureError: an unknown group, or an ill-formed name.
        ConfigError: parents in a circle.
    """
    tree = {
        normal_name(group, child): normal_name(group, parent) for child, parent in parents.items()
    }
    known = set(registry.names(group))
    above = {name: _ancestors(name, tree) for name in sorted({*tree, *known})}
    below: dict[str, list[str]] = {}
    for name in registry.names(group):
        for ancestor in above[name]:
            below.setdefault(ancestor, []).append(name)
    found = {}
    for name in sorted(set(tree) - known):
        relatives = next((below[a] for a in above[name] if a in below), None)
        nearest = next((a for a in above[name] if a in known or a in below), None)
        if nearest in known:
            found[name] = [str(nearest)]
        elif relatives:
            found[name] = relatives
    return found


def _ancestors(name: str, tree: Mapping[str, str]) -> list[str]:
    """A name and those above it, from below."""
    found = [name]
    while found[-1] in tree:
        parent = tree[found[-1]]
        if parent in found:
            raise ConfigError(
                f"the parents of {name!r} go in a circle: {' > '.join([*found, parent])}"
            )
        found.append(parent)
    return found


def by_vectors(
    registry: FeatureRegistry, group: str, vectors: Mapping[str, Sequence[float]], count: int = 1
) -> dict[str, list[str]]:
    """For each name that has a vector but no feature, find the known names with the nearest vectors.

    Args:
        registry: the features.
        group: the group.
        vectors: the vector of each name, for example its typological features; all of the same length, and none all
            zero.
        count: how many names to return.

    Returns:
        A mapping for ``encode(..., unknown=)``, the nearest by cosine first.

    Raises:
        FeatureError: an unknown group, an ill-formed name, or no vector of a known name.
        ConfigError: vectors of different lengths, with values that are not finite, or all zero; a count below 1.
    """
    count = whole(count, "count", 1)
    given = {normal_name(group, name): _unit(name, vector) for name, vector in vectors.items()}
    lengths = {len(vector) for vector in given.values()}
    if len(lengths) > 1:
        raise ConfigError(f"vectors are of one length, got {listed(sorted(map(str, lengths)))}")
    known = [name for name in registry.names(group) if name in given]
    if not known:
        names = listed(registry.names(group))
        raise FeatureError(f"no known name of group {group!r} has a vector; the group has {names}")
    table = np.stack([given[name] for name in known])
    found = {}
    for name in sorted(set(given) - set(registry.names(group))):
        order = np.argsort(-(table @ given[name]), kind="stable")[:count]
        found[name] = [known[i] for i in order]
    return found


def _unit(name: str, vector: Sequence[float]) -> NDArray[np.float64]:
    try:
        values = np.asarray(vector, np.float64)
    except (TypeError, ValueError):
        raise ConfigError(
            f"the vector of {name!r} is a list of numbers, got {shown(vector)}"
        ) from None
    size = float(np.linalg.norm(values)) if values.ndim == 1 else 0.0
    if not 0 < size < np.inf:
        raise ConfigError(
            f"the vector of {name!r} is a list of finite numbers, not all 0, got {shown(vector)}"
        )
    return values / size  # type: ignore[no-any-return]
