"""Encoding: from rows that name their features to a batch's routing (docs/specification.md §2.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from flix.core.checks import finite, whole
from flix.core.errors import FeatureError, RoutingError, listed, near, shown, warn
from flix.core.features.names import folded, normal, normal_group, normal_name, written
from flix.core.features.routing import Routing
from flix.core.features.table import FeatureTable

Row = Mapping[str, Union[str, Sequence[str], Mapping[str, float], None]]
"""What one example activates: ``{group: name | [names] | {name: weight} | None}``."""

Unknown = Union[str, Mapping[str, Union[str, Sequence[str]]]]
"""``"error"``, ``"skip"``, ``"mean"``, or ``{unknown name: a known name or several}``."""

POLICIES = ("error", "skip", "mean")

_LARGEST = float(np.finfo(np.float32).max)


def encode(
    registry: FeatureTable,
    rows: Iterable[Row],
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
        rows: any iterable, gone through once, of one mapping a row. A row may leave groups out (or give None). In
            ``{name: weight}``, names with None do not count: tables fill gaps with it.
        unknown: what an unknown feature does: ``"error"``; ``"skip"`` (the row's other features still act);
            ``"mean"`` (all features of its group, each with weight 1/n); or a mapping from the unknown name
            to a known one, or to several that share its weight equally. Unknown groups are always an error.
        width: the number of entries of a row; default: as many as the fullest row needs (at least 1).
        group_weights: a factor for every feature of a group.

    Raises:
        FeatureError: an unknown group or feature, with the row's number and near matches; or an ill-formed name.
        RoutingError: rows that are no iterable of mappings, a value of the wrong form, a weight that is not finite in
            float32, or a width too small or too large.
    """
    resolver = _Resolver(registry, unknown, group_weights)
    batch = _taken(rows)
    try:
        # Rows by the thousand hold few distinct (group, value) items: each is resolved once.
        items = [resolver[item] for row in batch for item in row.items()]
        lengths = [len(row) for row in batch]
    except (TypeError, AttributeError, FeatureError, RoutingError):
        # A list or mapping as a value (not hashable), or an error: again, so as to name the row.
        items, lengths = _resolve_by_row(resolver, batch)
    return _assemble(resolver, np.asarray(items, np.intp), np.asarray(lengths, np.intp), width)


def _taken(rows: Iterable[Row]) -> Sequence[Row]:
    """The rows, which may come from an iterator."""
    if isinstance(rows, list | tuple):
        return rows
    if isinstance(rows, Mapping):
        raise RoutingError(
            f"rows must be an iterable of mappings, one a row, got one mapping, {shown(rows)}; "
            "for a batch of one row, give [row]"
        )
    try:
        iterator = None if isinstance(rows, str | bytes) else iter(rows)
    except TypeError:
        iterator = None
    if iterator is None:
        raise RoutingError(
            f"rows must be an iterable of mappings {{group: feature}}, one a row, got {shown(rows)}"
        )
    return list(iterator)


def _resolve_by_row(resolver: _Resolver, rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    items: list[int] = []
    lengths: list[int] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise RoutingError(
                f"row {number}: a row is a mapping {{group: feature}}, got {shown(row)}"
            )
        try:
            items.extend(
                resolver[group, value if type(value) is str else members(group, value)]
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
    if (large := np.abs(weight) > _LARGEST).any():
        place = int(np.argmax(large))
        raise RoutingError(
            f"row {row[place]}: the weight of {written(registry.features[feature[place]])} must be finite in "
            f"float32, got {weight[place]:g}"
        )

    active = np.bincount(row, minlength=batch)
    longest = int(active.max(initial=0))
    if width is None:
        width = max(longest, 1)
    elif longest > whole(width, "width", 1, RoutingError):
        number = int(np.argmax(active > width))
        names = [written(registry.features[i]) for i in feature[row == number]]
        raise RoutingError(
            f"row {number}: {len(names)} features are active but width is {width}; active: "
            f"{listed(names)}"
        )
    slot = np.arange(len(row)) - np.repeat(np.cumsum(active) - active, active)
    try:
        ids = np.full((batch, width), -1, dtype=np.int32)
        weights = np.zeros((batch, width), dtype=np.float32)
    except (MemoryError, ValueError, OverflowError):
        raise RoutingError(f"a width of {shown(width)} takes more memory than there is") from None
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
        if isinstance(unknown, Mapping):
            self.unknown = {_unknown_name(name): given for name, given in unknown.items()}
        factors = dict.fromkeys(registry.groups, 1.0)
        for group, factor in _factors(group_weights).items():
            registry.ids_of(group)
            factors[normal_group(group)] = finite(
                factor, f"the weight of group {group!r}", RoutingError
            )
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
            for name, weight in members(group, value)
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
        known = self.registry.find(group, name)
        if known is not None:
            return [(known, 1.0, True)]
        name = normal_name(group, name)
        names = self.registry.names(group)
        if self.unknown == "error" or (
            isinstance(self.unknown, Mapping) and name not in self.unknown
        ):
            raise FeatureError(
                f"group {group!r} has no feature {name!r}{near(name, names)}; it has: "
                f"{listed(names)}. To serve unknown features, choose unknown='skip', 'mean' or a "
                "mapping {name: fallback}"
            )
        if isinstance(self.unknown, Mapping):
            fallback = self.unknown[name]
            several = [fallback] if isinstance(fallback, str) else list(fallback)
            return [(self.registry.id(group, one), 1.0 / len(several), True) for one in several]
        for other in names:
            if folded(other) == folded(name):
                warn(
                    f"group {group!r} has no feature {name!r}, but {other!r}, which differs only in case or "
                    f"by compatibility; {name!r} counts as unknown"
                )
        if self.unknown == "skip":
            return []
        ids = self.registry.ids_of(group)
        return [(member, 1.0 / len(ids), False) for member in ids]


def _factors(group_weights: object) -> Mapping[str, Any]:
    if group_weights is None:
        return {}
    if isinstance(group_weights, Mapping):
        return group_weights
    raise RoutingError(f"group_weights must be {{group: factor}}, got {shown(group_weights)}")


def check_policy(unknown: object) -> None:
    """Refuse a value that is not a policy for unknown features.

    Raises:
        RoutingError: neither one of the three names nor a mapping of names.
        FeatureError: an ill-formed name in the mapping.
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
        names = [_unknown_name(name) for name in unknown]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RoutingError(f"unknown gives {twice!r} a fallback twice, in two Unicode forms")
        return
    raise RoutingError(
        "unknown must be 'error', 'skip', 'mean' or a mapping {name: fallback name or list}, "
        f"got {shown(unknown)}"
    )


def _unknown_name(name: str) -> str:
    return normal(name, "an unknown feature")


Members = tuple[tuple[str, float], ...]
"""What a row says of one group: names with weights."""


class _Checked(tuple):  # type: ignore[type-arg]
    """:data:`Members` that :func:`members` made."""


def members(group: str, value: object) -> Members:
    """What a row says of one group, as names with weights; nothing for None.

    Raises:
        RoutingError: a value of another form, or a weight that is not finite in float32.
    """
    if isinstance(value, _Checked):
        return value
    if value is None:
        return _Checked()
    if isinstance(value, str):
        return _Checked(((value, 1.0),))
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, Mapping):
        named = {name: weight for name, weight in value.items() if weight is not None}
        if value and not named:
            raise RoutingError(f"group {group!r}: no name has a weight in {shown(value)}")
        pairs = [(name, _weight(group, name, weight)) for name, weight in named.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        pairs = [(name, 1.0) for name in value]
    else:
        raise RoutingError(
            f"group {group!r} takes a feature name, a list of names or {{name: weight}}, "
            f"got {shown(value)}"
        )
    for name, _ in pairs:
        if not isinstance(name, str):
            raise RoutingError(f"group {group!r}: a feature's name is a string, got {shown(name)}")
    return _Checked(pairs)


def _weight(group: str, name: object, weight: object) -> float:
    what = f"the weight of {group}={name if isinstance(name, str) else shown(name)}"
    number = finite(weight, what, RoutingError)
    if abs(number) > _LARGEST:
        raise RoutingError(f"{what} must be finite in float32, got {number:g}")
    return number
