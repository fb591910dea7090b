"""Routing: which features act in each row of a batch, and how strongly (docs/specification.md §2.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import FeatureError, RoutingError, listed, near

if TYPE_CHECKING:
    from flix.core.features.registry import FeatureRegistry

Row = Mapping[str, Union[str, Sequence[str], Mapping[str, float], None]]
"""What one example activates: ``{group: name | [names] | {name: weight} | None}``."""

Unknown = Union[str, Mapping[str, Union[str, Sequence[str]]]]
"""``"error"``, ``"skip"``, ``"mean"``, or ``{unknown name: a known name or several}``."""

POLICIES = ("error", "skip", "mean")


@dataclass(frozen=True, eq=False)
class Routing:
    """The active features of each row.

    Attributes:
        ids: int32 ``[batch, width]`` (or ``[batch, length, width]`` for per-token routing); -1 pads.
        weights: float32 in the shape of ``ids``; 0 where ids is -1.
        registry: the registry that the ids belong to.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    registry: FeatureRegistry

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def width(self) -> int:
        """The number of entries in a row."""
        return int(self.ids.shape[-1])

    def __getitem__(self, rows: Any) -> Routing:
        """The routing of some rows (a slice, or an array of row numbers)."""
        if isinstance(rows, int | np.integer):
            rows = [rows]
        return Routing(self.ids[rows], self.weights[rows], self.registry)

    def names(self, row: int) -> dict[tuple[str, str], float]:
        """The features of a row with their weights; for messages and inspection."""
        ids, weights = self.ids[row].ravel(), self.weights[row].ravel()
        return {
            self.registry.features[i]: float(w)
            for i, w in zip(ids.tolist(), weights.tolist(), strict=True)
            if i >= 0
        }


def encode(
    registry: FeatureRegistry,
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
    elif isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise RoutingError(f"width must be a positive integer or None, got {width!r}")
    elif longest > width:
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
        registry: FeatureRegistry,
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
            factors[group] = finite(factor, f"the weight of group {group!r}")
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


def finite(value: object, what: str) -> float:
    """``value`` as a float.

    Raises:
        RoutingError: not a number, or not finite.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer | np.floating)
        or not math.isfinite(value)
    ):
        raise RoutingError(f"{what} must be a finite number, got {value!r}")
    return float(value)


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
        pairs = [(name, finite(w, f"the weight of {group}:{name}")) for name, w in value]
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


def check_routing(
    ids: NDArray[Any],
    weights: NDArray[Any] | None,
    registry: FeatureRegistry,
    *,
    batch: int | None = None,
) -> None:
    """Refuse routing arrays that break the rules; backends call this on the host before they execute.

    Args:
        ids: integer ``[batch, width]`` or ``[batch, length, width]``, each -1 (padding) or a feature's id.
        weights: None, or finite floats in the shape of ``ids``.
        registry: the registry that the ids belong to.
        batch: the number of rows expected, if known.

    Raises:
        RoutingError: wrong dtype, rank, shape, range or batch size; the first bad row is named.
    """
    if ids.dtype.kind not in "iu":
        raise RoutingError(
            f"flix_features must hold integer ids, got dtype {ids.dtype}; make them with "
            "registry.encode(rows)"
        )
    if ids.ndim not in (2, 3):
        raise RoutingError(
            "flix_features must have the shape [batch, width] or [batch, length, width], "
            f"got {list(ids.shape)}"
        )
    if batch is not None and ids.shape[0] != batch:
        raise RoutingError(
            f"flix_features routes {ids.shape[0]} rows, but the batch has {batch} rows; "
            "one row of ids is needed for each row of the batch"
        )
    bad = (ids < -1) | (ids >= len(registry))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise RoutingError(
            f"flix_features has the id {int(ids[place])} in row {place[0]} (position {list(place)}); "
            f"valid ids are 0 to {len(registry) - 1}, and -1 for padding"
        )
    if registry.removed:
        _check_removed(ids, registry)
    if weights is None:
        return
    if weights.dtype.kind not in "fV":  # V: bfloat16 seen from numpy
        raise RoutingError(f"flix_weights must be floating point, got dtype {weights.dtype}")
    if weights.shape != ids.shape:
        raise RoutingError(
            f"flix_weights must have the shape of flix_features, {list(ids.shape)}, "
            f"got {list(weights.shape)}"
        )
    odd = ~np.isfinite(weights)
    if odd.any():
        place = tuple(int(i) for i in np.argwhere(odd)[0])
        feature = int(ids[place])
        name = ":".join(registry.features[feature]) if feature >= 0 else "padding"
        raise RoutingError(
            f"flix_weights must be finite, got {weights[place]} in row {place[0]} for {name}"
        )


def _check_removed(ids: NDArray[Any], registry: FeatureRegistry) -> None:
    found = np.isin(ids, registry.removed_ids)
    if found.any():
        place = tuple(int(i) for i in np.argwhere(found)[0])
        name = ":".join(registry.features[int(ids[place])])
        raise RoutingError(
            f"flix_features has the id {int(ids[place])} in row {place[0]}: {name}, which was removed; "
            "make ids with registry.encode(rows)"
        )
