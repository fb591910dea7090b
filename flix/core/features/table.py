"""A table of features: which there are, the id of each, and what each implies (docs/specification.md §2.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from flix.core.errors import FeatureError, listed, near
from flix.core.features.names import EVERY, Feature, check_group, check_name, pair


class FeatureTable:
    """An immutable, ordered set of features in groups, as it is looked up.

    :class:`flix.FeatureRegistry` is what users make; it derives new tables and encodes rows.

    Ids are the positions 0 .. len - 1 in the order of registration; the id of a feature that was removed stays
    reserved for its name.
    """

    __slots__ = ("_closures", "_features", "_groups", "_ids", "_implies", "_members", "_removed")

    def __init__(
        self,
        groups: Mapping[str, Sequence[str]],
        implies: Mapping[Feature, Iterable[Feature]] | None = None,
    ) -> None:
        if not isinstance(groups, Mapping) or not groups:
            raise FeatureError(
                "a registry needs at least one group of features, as {group: [names]}; "
                f"got {groups!r}"
            )
        features: list[Feature] = []
        for group, names in groups.items():
            check_group(group)
            if isinstance(names, str) or not isinstance(names, Sequence):
                raise FeatureError(f"group {group!r} needs a list of feature names, got {names!r}")
            if not names:
                raise FeatureError(f"group {group!r} is empty; a group needs at least one feature")
            for name in names:
                check_name(group, name)
                features.append((group, name))
        self._fill(tuple(groups), features, dict(implies or {}))

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
                    f"feature {feature[1]!r} occurs twice in group {feature[0]!r}; names are unique"
                )
            ids[feature] = len(ids)
        self._groups = groups
        self._features = tuple(features)
        self._removed = frozenset(removed)
        self._ids = {f: i for f, i in ids.items() if f not in self._removed}
        members: dict[str, list[int]] = {group: [] for group in groups}
        for feature, i in self._ids.items():
            members[feature[0]].append(i)
        self._members = {group: tuple(found) for group, found in members.items()}
        self._implies = {
            pair(source): tuple(pair(t) for t in targets) for source, targets in implies.items()
        }
        self._closures = self._close()

    def _close(self) -> tuple[tuple[int, ...], ...]:
        """What each feature implies, transitively, as ids; refuses cycles and unknown names."""
        direct: list[list[int]] = [[] for _ in self._features]
        for (group, name), targets in self._implies.items():
            sources = self.ids_of(group) if name == EVERY else (self.id(group, name),)
            for target_group, target in targets:
                implied = self.id(target_group, target)
                for source in sources:
                    direct[source].append(implied)
        closures: dict[int, tuple[int, ...]] = {}

        def visit(feature: int, path: tuple[int, ...]) -> tuple[int, ...]:
            if feature in path:
                chain = (*path[path.index(feature) :], feature)
                text = " -> ".join(":".join(self._features[i]) for i in chain)
                raise FeatureError(f"implications must not form a cycle; got {text}")
            if feature not in closures:
                found: dict[int, None] = {}
                for implied in direct[feature]:
                    found[implied] = None
                    found.update(dict.fromkeys(visit(implied, (*path, feature))))
                closures[feature] = tuple(found)
            return closures[feature]

        return tuple(visit(feature, ()) for feature in range(len(self._features)))

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

    def __len__(self) -> int:
        return len(self._features)

    def __contains__(self, feature: object) -> bool:
        return feature in self._ids

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

    def id(self, group: str, name: str) -> int:
        """The id of a feature.

        Raises:
            FeatureError: no such group or feature; near matches are named.
        """
        found = self._ids.get((group, name))
        if found is None:
            names = self.names(group)  # refuses an unknown group
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
        members = self._members.get(group)
        if members is None:
            raise FeatureError(
                f"no feature group {group!r}{near(str(group), self._groups)}; "
                f"the groups are: {listed(self._groups)}"
            )
        return members

    def implied(self, feature: int) -> tuple[int, ...]:
        """The ids that the feature with this id implies, transitively."""
        return self._closures[feature]

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
            groups = tuple(data["groups"])
            features = [pair(feature) for feature in data["features"]]
            implies = {
                pair(source): [pair(t) for t in targets]
                for source, targets in data.get("implies", [])
            }
            removed = [pair(feature) for feature in data.get("removed", [])]
        except (KeyError, TypeError, ValueError) as error:
            raise FeatureError(
                "a registry is written as {'groups': [...], 'features': [[group, name], ...], "
                f"'implies': [...]}}; got something else ({error})"
            ) from error
        for feature in removed:
            if feature not in features:
                raise FeatureError(f"the removed feature {feature!r} is not among the features")
        for group in groups:
            check_group(group)
            if all(feature[0] != group or feature in removed for feature in features):
                raise FeatureError(f"group {group!r} is empty; a group needs at least one feature")
        for group, name in features:
            check_name(group, name)
            if group not in groups:
                raise FeatureError(f"feature {name!r} names the group {group!r}, not listed")
        return cls._derive(groups, features, implies, removed)
