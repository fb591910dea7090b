"""Whose a row is, where the features of one group are tenants: independent adapters that train in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flix.core.checks import is_number, whole
from flix.core.errors import ConfigError, RoutingError, shown
from flix.core.features.names import Feature, normal_group, pair, written
from flix.core.features.routing import check_form
from flix.core.features.table import FeatureTable

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Owners:
    """Which feature of a group each row of a batch has.

    Attributes:
        ids: the features that have rows, ascending.
        features: their names.
        slots: int64 ``[batch]``: each row's place in ``ids``; ``len(ids)`` for rows that have none.
    """

    ids: tuple[int, ...]
    features: tuple[Feature, ...]
    slots: NDArray[np.int64]


def row_owners(ids: NDArray[Any], registry: FeatureTable, group: str) -> Owners:
    """Whose each row is: the feature of a group that it names, with whatever weight.

    Args:
        ids: integer ``[batch, width]``, or ``[batch, length, width]`` for routing by token.
        registry: the registry that the ids belong to.
        group: the group whose features own rows.

    Raises:
        FeatureError: no such group.
        RoutingError: malformed ids, or a row that names two features of the group.
    """
    members = registry.ids_of(group)
    check_form(ids)
    flat = ids.reshape(len(ids), math.prod(ids.shape[1:]))
    named = np.where(np.isin(flat, members), flat, -1)
    last = named.max(axis=1, initial=-1)
    first = np.where(named < 0, last[:, None], named).min(axis=1, initial=len(registry))
    two = (last >= 0) & (first != last)
    if two.any():
        row = int(two.argmax())
        both = " and ".join(written(registry.features[int(i[row])]) for i in (first, last))
        raise RoutingError(
            f"row {row} names {both}; a row of tenants names one feature of group {group!r}, "
            "or its loss would train one by the other"
        )
    found, slots = np.unique(last, return_inverse=True)
    slots = slots.reshape(-1).astype(np.int64)
    if found.size and found[0] < 0:  # those without an owner come last
        found, slots = found[1:], np.where(slots == 0, found.size - 1, slots - 1)
    owners = tuple(int(i) for i in found)
    return Owners(owners, tuple(registry.features[i] for i in owners), slots)


def owner_parts(owners: Owners, rows: int) -> list[NDArray[np.int64]]:
    """A batch in parts, each with all the rows of those who have any in it: what fits is taken in the order of ids.

    Args:
        owners: whose each row is.
        rows: how many rows a part has at most; one owner with more has a part of their own.

    Returns:
        The places of each part's rows, ascending, int64; rows of nobody fill up the last parts.

    Raises:
        ConfigError: rows that are no whole number of 1 or more.
    """
    most = whole(rows, "rows", 1)
    places = [np.flatnonzero(owners.slots == slot) for slot in range(len(owners.ids))]
    nobodys = np.flatnonzero(owners.slots == len(owners.ids))
    places += list(nobodys[:, None])
    parts: list[list[NDArray[np.int64]]] = []
    room = 0
    for some in places:
        if len(some) > room:
            parts.append([])
            room = most
        parts[-1].append(some)
        room -= len(some)
    return [np.sort(np.concatenate(part)) for part in parts]


def per_feature(
    what: str, given: Any, registry: FeatureTable, check: Callable[[Any, str], T]
) -> dict[Feature, T]:
    """A setting by feature, of one for all, or of a mapping by ``(group, name)`` or group; features win over groups.

    Args:
        what: the setting's name, for messages.
        given: the setting.
        registry: the features.
        check: gives a value as it is kept, or raises; it gets the value and its name.

    Returns:
        The setting of every feature that one was given for.

    Raises:
        FeatureError: an unknown feature or group.
        ConfigError: another kind of key, or what ``check`` raises.
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(registry.live, check(given, what))
    found: dict[Feature, T] = {}
    seen: set[str | Feature] = set()
    for key in sorted(given, key=lambda key: not isinstance(key, str)):
        value = check(given[key], f"{what} of {shown(key)}")
        name: str | Feature
        if isinstance(key, str):
            chosen, name = registry.ids_of(key), normal_group(key)
        elif isinstance(key, tuple) and len(key) == 2:
            chosen, name = (registry.id(*key),), pair(key)
        else:
            raise ConfigError(
                f"{what} names features as (group, name), or groups, got {shown(key)}"
            )
        if name in seen:
            raise ConfigError(f"{what} is given twice for {shown(key)}, in two Unicode forms")
        seen.add(name)
        found.update(dict.fromkeys((registry.features[i] for i in chosen), value))
    return found


def positive(value: Any, what: str) -> float:
    """A norm that gradients are clipped to: positive; infinity asks for the norm alone.

    Raises:
        ConfigError: another thing.
    """
    if not is_number(value) or not value > 0:
        raise ConfigError(f"{what} must be a positive number, got {shown(value)}")
    return float(value)
