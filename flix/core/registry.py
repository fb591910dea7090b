"""The feature registry: which features there are, and the id of each (SPEC §2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flix.core.errors import FeatureError, listed, near
from flix.core.routing import Routing, Row, Unknown, encode

Feature = tuple[str, str]
"""A feature is named by its group and its own name: ``("language", "hau")``."""

EVERY = "*"
"""In ``implies``, ``(group, "*")`` stands for every feature of the group, later ones too."""


class FeatureRegistry:
    """An immutable, ordered set of features in groups.

    Ids are the positions 0 .. len - 1 in the order of registration. They are append-only: a registry made by
    :meth:`with_feature` keeps every id of the one it came from.

    Args:
        groups: the features' names by group, for example ``{"language": ["hau", "swa"], "task": ["ner"]}``.
        implies: features that others bring along: ``{("language", "fra"): [("family", "romance")]}``. The key
            ``("task", "*")`` speaks for every feature of the group.

    Raises:
        FeatureError: no group, an empty group, an ill-formed or duplicate name, an implied feature that does
            not exist, or implications that form a cycle.
    """

    __slots__ = ("_closures", "_features", "_groups", "_ids", "_implies", "_members")

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
            _check_group(group)
            if isinstance(names, str) or not isinstance(names, Sequence):
                raise FeatureError(f"group {group!r} needs a list of feature names, got {names!r}")
            if not names:
                raise FeatureError(f"group {group!r} is empty; a group needs at least one feature")
            for name in names:
                _check_name(group, name)
                features.append((group, name))
        self._fill(tuple(groups), features, dict(implies or {}))

    def _fill(
        self,
        groups: tuple[str, ...],
        features: Sequence[Feature],
        implies: Mapping[Feature, Iterable[Feature]],
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
        self._ids = ids
        self._members = {
            group: tuple(i for i, feature in enumerate(features) if feature[0] == group)
            for group in groups
        }
        self._implies = {
            _pair(source): tuple(_pair(t) for t in targets) for source, targets in implies.items()
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
        """All features as (group, name), in the order of their ids."""
        return self._features

    @property
    def implies(self) -> dict[Feature, tuple[Feature, ...]]:
        """The implications as they were declared."""
        return dict(self._implies)

    def __len__(self) -> int:
        return len(self._features)

    def __contains__(self, feature: object) -> bool:
        return feature in self._ids

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FeatureRegistry):
            return NotImplemented
        return (self._groups, self._features, self._implies) == (
            other._groups,
            other._features,
            other._implies,
        )

    def __hash__(self) -> int:
        return hash((self._groups, self._features))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{group}: {len(self.ids_of(group))}" for group in self._groups)
        return f"FeatureRegistry({sizes})"

    def id(self, group: str, name: str) -> int:
        """The id of a feature.

        Raises:
            FeatureError: no such group or feature; near matches are named.
        """
        found = self._ids.get((group, name))
        if found is None:
            names = self.names(group)  # refuses an unknown group
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

    def with_feature(
        self, group: str, name: str, implies: Iterable[Feature] = ()
    ) -> FeatureRegistry:
        """A registry with one more feature, whose id is the old length; every other id stays.

        Raises:
            FeatureError: unknown group, ill-formed or duplicate name, or unknown implied feature.
        """
        self.ids_of(group)
        _check_name(group, name)
        declared = {**self._implies}
        if implies := tuple(implies):
            declared[(group, name)] = implies
        return self._derive(self._groups, (*self._features, (group, name)), declared)

    def with_group(self, group: str, names: Sequence[str]) -> FeatureRegistry:
        """A registry with one more group; its features' ids follow the present ones.

        Raises:
            FeatureError: the group exists already, is empty, or has an ill-formed or duplicate name.
        """
        if group in self._groups:
            raise FeatureError(f"group {group!r} exists already; add to it with with_feature")
        added = FeatureRegistry({group: names})
        return self._derive(
            (*self._groups, group), (*self._features, *added.features), self._implies
        )

    @classmethod
    def _derive(
        cls,
        groups: tuple[str, ...],
        features: Sequence[Feature],
        implies: Mapping[Feature, Iterable[Feature]],
    ) -> FeatureRegistry:
        registry = cls.__new__(cls)
        registry._fill(groups, features, implies)
        return registry

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; :meth:`from_dict` gives an equal registry with the same ids."""
        return {
            "groups": list(self._groups),
            "features": [list(feature) for feature in self._features],
            "implies": [
                [list(source), [list(target) for target in targets]]
                for source, targets in self._implies.items()
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FeatureRegistry:
        """The registry that :meth:`to_dict` described.

        Raises:
            FeatureError: a form that :meth:`to_dict` does not write, or content that breaks a rule.
        """
        try:
            groups = tuple(data["groups"])
            features = [_pair(feature) for feature in data["features"]]
            implies = {
                _pair(source): [_pair(t) for t in targets]
                for source, targets in data.get("implies", [])
            }
        except (KeyError, TypeError, ValueError) as error:
            raise FeatureError(
                "a registry is written as {'groups': [...], 'features': [[group, name], ...], "
                f"'implies': [...]}}; got something else ({error})"
            ) from error
        for group in groups:
            _check_group(group)
            if all(feature[0] != group for feature in features):
                raise FeatureError(f"group {group!r} is empty; a group needs at least one feature")
        for group, name in features:
            _check_name(group, name)
            if group not in groups:
                raise FeatureError(f"feature {name!r} names the group {group!r}, not listed")
        return cls._derive(groups, features, implies)

    def encode(
        self,
        rows: Sequence[Row],
        unknown: Unknown = "error",
        *,
        width: int | None = None,
        group_weights: Mapping[str, float] | None = None,
    ) -> Routing:
        """The routing of a batch: see :func:`flix.core.routing.encode`."""
        return encode(self, rows, unknown, width=width, group_weights=group_weights)


def _check_group(group: object) -> None:
    if not isinstance(group, str) or not group or "." in group:
        raise FeatureError(
            f"a group's name is a non-empty string without '.', got {group!r} "
            "(the group ends at the first '.' in the names of an adapter's tensors)"
        )


def _check_name(group: str, name: object) -> None:
    if not isinstance(name, str) or not name or name == EVERY:
        raise FeatureError(
            f"a feature's name in group {group!r} is a non-empty string other than '*', "
            f"got {name!r}"
        )


def _pair(feature: object) -> Feature:
    if (
        isinstance(feature, list | tuple)
        and len(feature) == 2
        and all(isinstance(part, str) for part in feature)
    ):
        return (feature[0], feature[1])
    raise FeatureError(f"a feature is named as a pair (group, name), got {feature!r}")
