"""A table of features: which there are, the id of each, and what each implies (docs/specification.md §2.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from flix.core.errors import FeatureError, listed, near, shown
from flix.core.features.names import (
    EVERY,
    Feature,
    normal,
    normal_group,
    normal_name,
    pair,
    pairs,
    warn_alike,
    written,
)

_KEPT = 100  # a longer list of implied features is found anew each time it is asked for


class FeatureTable:
    """An immutable, ordered set of features in groups, as it is looked up.

    :class:`flix.FeatureRegistry` is what users make; it derives new tables and encodes rows.

    Ids are the positions 0 .. len - 1 in the order of registration; the id of a feature that was removed stays
    reserved for its name. Making a table takes time in proportion to its size.
    """

    __slots__ = ("_closures", "_features", "_groups", "_ids", "_implies", "_links", "_members", "_removed")  # fmt: skip

    def __init__(
        self,
        groups: Mapping[str, Sequence[str]],
        implies: Mapping[Feature, Iterable[Feature]] | None = None,
    ) -> None:
        if not isinstance(groups, Mapping) or not groups:
            raise FeatureError(
                "a registry needs at least one group of features, as {group: [names]}; "
                f"got {shown(groups)}"
            )
        features: list[Feature] = []
        kept: list[str] = []
        for given, names in groups.items():
            group = normal_group(given)
            kept.append(group)
            if isinstance(names, str) or not isinstance(names, Sequence):
                raise FeatureError(
                    f"group {group!r} needs a list of feature names, got {shown(names)}"
                )
            if not names:
                raise FeatureError(f"group {group!r} is empty; a group needs at least one feature")
            features.extend((group, normal_name(group, name)) for name in names)
        if implies is not None and not isinstance(implies, Mapping):
            raise FeatureError(
                f"implies must be {{(group, feature): [(group, feature), ...]}}, got {shown(implies)}"
            )
        self._fill(tuple(kept), features, implies or {})
        self._warn_alike()

    def _fill(
        self,
        groups: tuple[str, ...],
        features: Sequence[Feature],
        implies: Mapping[Feature, Iterable[Feature]],
        removed: Iterable[Feature] = (),
    ) -> None:
        ids: dict[Feature, int] = {}
        for feature in features:
            if feature in ids:
                raise FeatureError(
                    f"feature {feature[1]!r} occurs twice in group {feature[0]!r}; names are unique, "
                    "in Unicode's NFC"
                )
            ids[feature] = len(ids)
        members: dict[str, list[int]] = {}
        for group in groups:
            if group in members:
                raise FeatureError(
                    f"the group {group!r} occurs twice; groups are unique, in Unicode's NFC"
                )
            members[group] = []
        self._groups = groups
        self._features = tuple(features)
        self._removed = frozenset(removed)
        self._ids = {f: i for f, i in ids.items() if f not in self._removed}
        for feature, i in self._ids.items():
            members[feature[0]].append(i)
        self._members = {group: tuple(found) for group, found in members.items()}
        self._implies = _declared(implies)
        self._links = self._link()
        self._closures: dict[int, tuple[int, ...]] = {}
        self._refuse_cycles()

    def _link(self) -> dict[int, list[int]]:
        """What each feature implies itself, as ids. A group's ``*`` has a number above all ids, for its own list."""
        links: dict[int, list[int]] = {}
        above = len(self._features)
        for (group, name), targets in self._implies.items():
            if name == EVERY:
                source, above = above, above + 1
                for member in self.ids_of(group):
                    links.setdefault(member, []).append(source)
            else:
                source = self.id(group, name)
            links.setdefault(source, []).extend(self.id(*target) for target in targets)
        return links

    def _refuse_cycles(self) -> None:
        done: set[int] = set()
        for start in self._links:
            path: dict[int, Iterator[int]] = {}
            following: int | None = start
            while following is not None or path:
                if following is None:
                    last = next(reversed(path))
                    following = next(path[last], None)
                    if following is None:
                        del path[last]
                        done.add(last)
                elif following in path:
                    chain = [*path]
                    raise FeatureError(
                        "implications must not form a cycle; got "
                        + self._chain([*chain[chain.index(following) :], following])
                    )
                else:
                    if following not in done:
                        path[following] = iter(self._links.get(following, ()))
                    following = None

    def _chain(self, cycle: Sequence[int]) -> str:
        names = [written(self._features[i]) for i in cycle if i < len(self._features)]
        if cycle[0] >= len(self._features):  # it began at a group's "*", which has no name to show
            names.append(names[0])
        middle = names if len(names) <= 20 else [*names[:10], "...", *names[-9:]]
        return " -> ".join(middle)

    def _warn_alike(self) -> None:
        warn_alike(None, self._groups)
        for group in self._groups:
            warn_alike(group, self.names(group))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups' names, in order of registration."""
        return self._groups

    @property
    def features(self) -> tuple[Feature, ...]:
        """All features as (group, name), in the order of their ids; those that were removed keep their places."""
        return self._features

    @property
    def removed(self) -> frozenset[Feature]:
        """The features that were removed: no row activates them, their ids stay reserved."""
        return self._removed

    @property
    def removed_ids(self) -> tuple[int, ...]:
        """The ids of the features that were removed, ascending."""
        return tuple(i for i, f in enumerate(self._features) if f in self._removed)

    @property
    def live(self) -> tuple[Feature, ...]:
        """The features that were not removed, in the order of their ids."""
        return tuple(self._ids)

    @property
    def implies(self) -> dict[Feature, tuple[Feature, ...]]:
        """The implications as they were declared."""
        return dict(self._implies)

    def declared(self, source: Feature) -> tuple[Feature, ...]:
        """What was declared that a feature, or a group as ``(group, "*")``, implies itself."""
        return self._implies.get(source, ())

    def __len__(self) -> int:
        return len(self._features)

    def __contains__(self, feature: object) -> bool:
        return isinstance(feature, tuple) and len(feature) == 2 and self.find(*feature) is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FeatureTable):
            return NotImplemented
        return (self._groups, self._features, self._implies, self._removed) == (
            other._groups,
            other._features,
            other._implies,
            other._removed,
        )

    def __hash__(self) -> int:
        return hash((self._groups, self._features))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{group}: {len(self.ids_of(group))}" for group in self._groups)
        return f"{type(self).__name__}({sizes})"

    def find(self, group: object, name: object) -> int | None:
        """The id of a feature under whichever Unicode form of its name; None if there is none."""
        if not isinstance(group, str) or not isinstance(name, str):
            return None
        found = self._ids.get((group, name))
        if found is None and not (group.isascii() and name.isascii()):
            try:
                found = self._ids.get((normal(group, "a group"), normal(name, "a feature")))
            except FeatureError:
                return None
        return found

    def id(self, group: str, name: str) -> int:
        """The id of a feature.

        Raises:
            FeatureError: no such group or feature; near matches are named.
        """
        found = self.find(group, name)
        if found is None:
            names = self.names(group)  # refuses an unknown group
            group = normal_group(group)
            name = normal_name(group, name)
            if (group, name) in self._removed:
                raise FeatureError(
                    f"feature {name!r} of group {group!r} was removed (its id stays reserved); "
                    f"the group has: {listed(names)}"
                )
            raise FeatureError(
                f"group {group!r} has no feature {name!r}{near(str(name), names)}; "
                f"it has: {listed(names)}"
            )
        return found

    def names(self, group: str) -> tuple[str, ...]:
        """The names of a group's features, in the order of their ids.

        Raises:
            FeatureError: no such group.
        """
        return tuple(self._features[i][1] for i in self.ids_of(group))

    def ids_of(self, group: str) -> tuple[int, ...]:
        """The ids of a group's features.

        Raises:
            FeatureError: no such group.
        """
        members = self._members.get(group) if isinstance(group, str) else None
        if members is None and isinstance(group, str):
            members = self._members.get(normal(group, "a group"))
        if members is None:
            raise FeatureError(
                f"no feature group {shown(group)}{near(str(group), self._groups)}; "
                f"the groups are: {listed(self._groups)}"
            )
        return members

    def implied(self, feature: int) -> tuple[int, ...]:
        """The ids that the feature with this id implies, transitively."""
        found = self._closures.get(feature)
        if found is None:
            found = tuple(self.walk_implied(feature))
            if len(found) <= _KEPT:
                self._closures[feature] = found
        return found

    def walk_implied(self, feature: int) -> Iterator[int]:
        """What :meth:`implied` returns, one by one."""
        seen = {feature}
        pending = [iter(self._links.get(feature, ()))]
        while pending:
            following = next(pending[-1], None)
            if following is None:
                pending.pop()
            elif following not in seen:
                seen.add(following)
                if following < len(self._features):
                    yield following
                pending.append(iter(self._links.get(following, ())))

    @property
    def implied_ids(self) -> frozenset[int]:
        """The ids that some feature implies."""
        found = {i for targets in self._links.values() for i in targets}
        return frozenset(i for i in found if i < len(self._features))

    @classmethod
    def _derive(
        cls,
        groups: tuple[str, ...],
        features: Sequence[Feature],
        implies: Mapping[Feature, Iterable[Feature]],
        removed: Iterable[Feature] = (),
    ) -> Self:
        registry = cls.__new__(cls)
        registry._fill(groups, features, implies, removed)
        return registry

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; :meth:`from_dict` gives an equal registry with the same ids."""
        form = {
            "groups": list(self._groups),
            "features": [list(feature) for feature in self._features],
            "implies": [
                [list(source), [list(target) for target in targets]]
                for source, targets in self._implies.items()
            ],
        }
        if self._removed:
            form["removed"] = [list(f) for f in self._features if f in self._removed]
        return form

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The registry that :meth:`to_dict` described.

        Raises:
            FeatureError: a form that :meth:`to_dict` does not write, or content that breaks a rule.
        """
        try:
            groups = tuple(normal_group(group) for group in data["groups"])
            features = [pair(feature) for feature in data["features"]]
            implies: dict[Feature, list[Feature]] = {}
            for given, targets in data.get("implies", []):
                source = pair(given)
                if source in implies:
                    raise FeatureError(f"what {written(source)} implies is given twice")
                implies[source] = [pair(target) for target in targets]
            removed = [pair(feature) for feature in data.get("removed", [])]
        except FeatureError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FeatureError(
                "a registry is written as {'groups': [...], 'features': [[group, name], ...], "
                f"'implies': [...]}}; got something else ({shown(error)})"
            ) from error
        known = set(features)
        for feature in removed:
            if feature not in known:
                raise FeatureError(f"the removed feature {feature!r} is not among the features")
        live = {feature[0] for feature in known.difference(removed)}
        listed_groups = set(groups)
        for group in groups:
            if group not in live:
                raise FeatureError(f"group {group!r} is empty; a group needs at least one feature")
        for group, name in features:
            if name == EVERY:
                normal_name(group, name)  # raises
            if group not in listed_groups:
                raise FeatureError(f"feature {name!r} names the group {group!r}, not listed")
        table = cls._derive(groups, features, implies, removed)
        table._warn_alike()
        return table


def _declared(
    implies: Mapping[Feature, Iterable[Feature]],
) -> dict[Feature, tuple[Feature, ...]]:
    """Implications as they are kept.

    Raises:
        FeatureError: an ill-formed name, no list of features, or one feature's given twice.
    """
    found: dict[Feature, tuple[Feature, ...]] = {}
    for given, targets in implies.items():
        source = pair(given)
        if source in found:
            raise FeatureError(f"what {written(source)} implies is given twice")
        found[source] = pairs(targets, f"what {written(source)} implies")
    return found
