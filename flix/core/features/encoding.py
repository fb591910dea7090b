"""Encoding: from rows that name their features to a batch's routing (docs/specification.md §2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from flix.core.checks import finite, whole
from flix.core.errors import FeatureError, RoutingError, listed, near
from flix.core.features.routing import Routing
from flix.core.features.table import FeatureTable

Row = Mapping[str, Union[str, Sequence[str], Mapping[str, float], None]]
"""What one example activates: ``{group: name | [names] | {name: weight} | None}``."""

Unknown = Union[str, Mapping[str, Union[str, Sequence[str]]]]
"""``"error"``, ``"skip"``, ``"mean"``, or ``{unknown name: a known name or several}``."""

POLICIES = ("error", "skip", "mean")


def encode(
    registry: FeatureTable,
    rows: Sequence[Row],
    unknown: Unknown = "error",
    *,
    width: int | None = None,
    group_weights: Mapping[str, float] | None = None,
) -> Routing:
    """Turn a batch of rows into ids and weights.

    Ids in a row ascend. A name acts with weight 1, or with the weight that its mapping gives; a name listed
    twice adds up. What an active feature implies acts too, once, with weight 1 unless the row names it
    itself; features that merely stand in under ``"mean"`` imply nothing.

    Args:
        registry: the features.
        rows: one mapping a row. A row may leave groups out (or give None).
        unknown: what an unknown feature does: ``"error"``; ``"skip"`` (the row's other features still act);
            ``"mean"`` (all features of its group, each with weight 1/n); or a mapping from the unknown name
            to a known one, or to several that share its weight equally. Unknown groups are always an error.
        width: the number of entries of a row; default: as many as the fullest row needs (at least 1).
        group_weights: a factor for every feature of a group.

    Raises:
        FeatureError: an unknown group or feature, with the row's number and near matches.
        RoutingError: a value of the wrong form, a weight that is not finite, or a width too small.
    """
    resolver = _Resolver(registry, unknown, group_weights)
    try:
        # Rows by the thousand hold few distinct (group, value) items: each is resolved once.
        items = [resolver[item] for row in rows for item in row.items()]
        lengths = [len(row) for row in rows]
    except (TypeError, AttributeError, FeatureError, RoutingError):
        # A list or mapping as a value (not hashable), or an error: again, so as to name the row.
        items, lengths = _resolve_by_row(resolver, rows)
    return _assemble(resolver, np.asarray(items, np.intp), np.asarray(lengths, np.intp), width)


def _resolve_by_row(resolver: _Resolver, rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    items: list[int] = []
    lengths: list[int] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise RoutingError(f"row {number}: a row is a mapping {{group: feature}}, got {row!r}")
        try:
            items.extend(
                resolver[group, value if type(value) is str else _frozen(value)]
                for group, value in row.items()
            )
        except (FeatureError, RoutingError) as error:
            raise type(error)(f"row {number}: {error}") from None
        lengths.append(len(row))
    return items, lengths


def _assemble(
    resolver: _Resolver, items: NDArray[np.intp], lengths: NDArray[np.intp], width: int | None
) -> Routing:
    """Items of rows -> ids and weights: expand each item, merge what falls on one feature, pad."""
    registry, batch = resolver.registry, len(lengths)
    counts = np.asarray(resolver.counts, np.intp)[items]
    starts = np.asarray(resolver.starts, np.intp)[items]
    total = int(counts.sum())
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    entry = np.repeat(starts, counts) + within
    row = np.repeat(np.repeat(np.arange(batch), lengths), counts)
    feature = np.asarray(resolver.features, np.int64)[entry]
    weight = np.asarray(resolver.weights, np.float64)[entry]
    implied = np.asarray(resolver.implied, bool)[entry]

    place = row * len(registry) + feature
    order = np.argsort(place, kind="stable")
    place = place[order]
    first = np.flatnonzero(np.diff(place, prepend=-1))
    row, feature = np.divmod(place[first], len(registry))
    if len(first):
        # What a row names adds up; what is only implied acts once, with weight 1.
        named = np.where(implied, 0.0, weight)[order]
        only_implied = np.logical_and.reduceat(implied[order], first)
        weight = np.where(only_implied, 1.0, np.add.reduceat(named, first))
    weight = weight[: len(first)] * np.asarray(resolver.factors)[feature]

    active = np.bincount(row, minlength=batch)
    longest = int(active.max(initial=0))
    if width is None:
        width = max(longest, 1)
    elif longest > whole(width, "width", 1, RoutingError):
        number = int(np.argmax(active > width))
        names = [":".join(registry.features[i]) for i in feature[row == number]]
        raise RoutingError(
            f"row {number}: {len(names)} features are active but width is {width}; active: "
            f"{listed(names)}"
        )
    slot = np.arange(len(row)) - np.repeat(np.cumsum(active) - active, active)
    ids = np.full((batch, width), -1, dtype=np.int32)
    weights = np.zeros((batch, width), dtype=np.float32)
    ids[row, slot] = feature
    weights[row, slot] = weight
    return Routing(ids, weights, registry)


class _Resolver(dict):  # type: ignore[type-arg]
    """Numbers the distinct (group, value) items, and keeps what each activates as flat lists.

    Item ``i`` activates the entries ``starts[i] : starts[i] + counts[i]`` of ``features``, ``weights``, ``implied``.
    """

    def __init__(
        self,
        registry: FeatureTable,
        unknown: Unknown,
        group_weights: Mapping[str, float] | None,
    ) -> None:
        super().__init__()
        check_policy(unknown)
        self.registry = registry
        self.unknown = unknown
        factors = dict.fromkeys(registry.groups, 1.0)
        for group, factor in (group_weights or {}).items():
            registry.ids_of(group)
            factors[group] = finite(factor, f"the weight of group {group!r}", RoutingError)
        self.factors = [factors[group] for group, _ in registry.features]
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.features: list[int] = []
        self.weights: list[float] = []
        self.implied: list[bool] = []

    def __missing__(self, item: tuple[str, Any]) -> int:
        group, value = item
        self.registry.ids_of(group)  # refuses an unknown group, also where the value is None
        entries = [
            (feature, weight * share, False, implies)
            for name, weight in (_members(group, value) if value is not None else ())
            for feature, share, implies in self.resolve(group, name)
        ]
        brought = {f: None for e in entries if e[3] for f in self.registry.implied(e[0])}
        entries += [(feature, 1.0, True, False) for feature in brought]
        self.starts.append(len(self.features))
        self.counts.append(len(entries))
        for feature, weight, implied, _ in entries:
            self.features.append(feature)
            self.weights.append(weight)
            self.implied.append(implied)
        self[item] = len(self.starts) - 1
        return len(self.starts) - 1

    def resolve(self, group: str, name: str) -> list[tuple[int, float, bool]]:
        """The features that act for a name: (id, share of the weight, whether it implies others)."""
        if (group, name) in self.registry:
            return [(self.registry.id(group, name), 1.0, True)]
        if self.unknown == "skip":
            return []
        if self.unknown == "mean":
            members = self.registry.ids_of(group)
            return [(member, 1.0 / len(members), False) for member in members]
        if isinstance(self.unknown, Mapping) and name in self.unknown:
            fallback = self.unknown[name]
            names = [fallback] if isinstance(fallback, str) else list(fallback)
            return [(self.registry.id(group, known), 1.0 / len(names), True) for known in names]
        names_known = self.registry.names(group)
        raise FeatureError(
            f"group {group!r} has no feature {name!r}{near(name, names_known)}; it has: "
            f"{listed(names_known)}. To serve unknown features, choose unknown='skip', 'mean' or a "
            "mapping {name: fallback}"
        )


def check_policy(unknown: object) -> None:
    """Refuse a value that is not a policy for unknown features.

    Raises:
        RoutingError: neither one of the three names nor a mapping of names.
    """
    if isinstance(unknown, str) and unknown in POLICIES:
        return
    if isinstance(unknown, Mapping) and all(
        isinstance(name, str)
        and (
            (isinstance(fallback, str) and fallback)
            or (
                isinstance(fallback, list | tuple)
                and len(fallback) > 0
                and all(isinstance(known, str) for known in fallback)
            )
        )
        for name, fallback in unknown.items()
    ):
        return
    raise RoutingError(
        "unknown must be 'error', 'skip', 'mean' or a mapping {name: fallback name or list}, "
        f"got {unknown!r}"
    )


def _frozen(value: object) -> object:
    """A hashable form of what a row says of a group; :func:`_members` reads it."""
    if isinstance(value, Mapping):
        return _Weighted(value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(value)
    return value


class _Weighted(tuple):  # type: ignore[type-arg]
    """The items of a {name: weight} mapping."""


def _members(group: str, value: object) -> list[tuple[str, float]]:
    """What a row says of one group, as names with weights."""
    if isinstance(value, str):
        return [(value, 1.0)]
    if isinstance(value, _Weighted):
        pairs = [
            (name, finite(w, f"the weight of {group}:{name}", RoutingError)) for name, w in value
        ]
    elif isinstance(value, tuple):
        pairs = [(name, 1.0) for name in value]
    else:
        raise RoutingError(
            f"group {group!r} takes a feature name, a list of names or {{name: weight}}, "
            f"got {value!r}"
        )
    for name, _ in pairs:
        if not isinstance(name, str):
            raise RoutingError(f"group {group!r}: a feature's name is a string, got {name!r}")
    return pairs
