"""The feature registry: it encodes rows, and others are derived from it (docs/specification.md §2.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flix.core.errors import FeatureError
from flix.core.features.encoding import Row, Unknown, encode
from flix.core.features.names import (
    EVERY,
    Feature,
    normal_group,
    normal_name,
    pairs,
    warn_alike,
    written,
)
from flix.core.features.routing import Routing
from flix.core.features.table import FeatureTable


class FeatureRegistry(FeatureTable):
    """An immutable, ordered set of features in groups.

    Ids are the positions 0 .. len - 1 in the order of registration. They are append-only: a registry made by
    :meth:`with_feature` keeps every id of the one it came from, and the id of a feature that was removed
    (:meth:`without_feature`) stays reserved for its name.

    Args:
        groups: the features' names by group, for example ``{"language": ["hau", "swa"], "task": ["ner"]}``.
        implies: features that others imply: ``{("language", "fra"): [("family", "romance")]}``. The key ``("task",
            "*")`` stands for every feature of the group.

    Raises:
        FeatureError: no group, an empty group, an ill-formed or duplicate name, an implied feature that does
            not exist, or implications that form a cycle.

    Names are kept in Unicode's NFC. Two names of a group, or two groups, that differ only in case or by compatibility
    get a warning.
    """

    __slots__ = ()

    def with_feature(
        self, group: str, name: str, implies: Iterable[Feature] = ()
    ) -> FeatureRegistry:
        """A registry with one more feature. Its id is the old length, and every other id stays.

        A feature that was removed before gets its old id again.

        Raises:
            FeatureError: unknown group, ill-formed or duplicate name, or unknown implied feature.
        """
        self.ids_of(group)
        group = normal_group(group)
        feature = (group, normal_name(group, name))
        declared = {**self._implies}
        if implies := pairs(implies, f"what {written(feature)} implies"):
            declared[feature] = implies
        if feature in self._removed:
            made = self._derive(self._groups, self._features, declared, self._removed - {feature})
        else:
            made = self._derive(self._groups, (*self._features, feature), declared, self._removed)
        warn_alike(group, made.names(group), {feature[1]})
        return made

    def without_feature(self, group: str, name: str) -> FeatureRegistry:
        """A registry without one feature. Every id stays, and the feature's id stays reserved for its name.

        Implications from and to this feature are removed too.

        Raises:
            FeatureError: no such feature, or the last of its group.
        """
        feature = self._features[self.id(group, name)]
        if len(self.ids_of(group)) == 1:
            raise FeatureError(
                f"{name!r} is the last feature of group {group!r}; a group needs at least one feature"
            )
        declared = {
            source: kept
            for source, targets in self._implies.items()
            if source != feature and (kept := tuple(t for t in targets if t != feature))
        }
        return self._derive(self._groups, self._features, declared, self._removed | {feature})

    def renamed(self, group: str, name: str, new: str) -> FeatureRegistry:
        """A registry in which one feature has another name and the same id.

        Raises:
            FeatureError: no such feature, an ill-formed name, or one that the group has (or had: the ids of
                removed features stay reserved for their names).
        """
        old = self._features[self.id(group, name)]
        feature = (old[0], normal_name(group, new))
        new = feature[1]
        if feature in self._features:
            state = (
                "was removed, and its id stays reserved" if feature in self._removed else "exists"
            )
            raise FeatureError(f"feature {new!r} of group {group!r} {state}; choose another name")

        def put(f: Feature) -> Feature:
            return feature if f == old else f

        declared = {
            put(source): tuple(put(t) for t in targets) for source, targets in self._implies.items()
        }
        made = self._derive(
            self._groups, tuple(put(f) for f in self._features), declared, self._removed
        )
        warn_alike(feature[0], made.names(feature[0]), {new})
        return made

    def subset(self, features: Iterable[Feature]) -> FeatureRegistry:
        """A registry of some features and of those that they imply, in the same order, with new ids.

        Raises:
            FeatureError: an unknown feature, or none at all.
        """
        chosen = [self.id(*feature) for feature in pairs(features, "the features of a subset")]
        if not chosen:
            raise FeatureError("a registry needs at least one feature, but none was chosen")
        kept, pending = {*chosen}, chosen
        while pending:  # what is implied is followed once, however many features imply it
            pending = [i for feature in pending for i in self._links.get(feature, ())]
            pending = [i for i in dict.fromkeys(pending) if i not in kept]
            kept.update(pending)
        names = [self._features[i] for i in sorted(kept) if i < len(self._features)]
        present = {feature[0] for feature in names}
        groups = tuple(g for g in self._groups if g in present)
        left = set(names)
        declared = {
            source: found
            for source, targets in self._implies.items()
            if (source in left or (source[1] == EVERY and source[0] in present))
            and (found := tuple(t for t in targets if t in left))
        }
        return self._derive(groups, names, declared)

    def with_group(self, group: str, names: Sequence[str]) -> FeatureRegistry:
        """A registry with one more group; the ids of its features follow the present ones.

        Raises:
            FeatureError: the group exists already, is empty, or has an ill-formed or duplicate name.
        """
        group = normal_group(group)
        if group in self._groups:
            raise FeatureError(f"group {group!r} exists already; add to it with with_feature")
        added = FeatureRegistry({group: names})
        groups = (*self._groups, group)
        warn_alike(None, groups, {group})
        return self._derive(
            groups, (*self._features, *added.features), self._implies, self._removed
        )

    def with_implications(self, implies: Mapping[Feature, Iterable[Feature]]) -> FeatureRegistry:
        """A registry with the same features and ids, and with these implications only.

        Raises:
            FeatureError: an unknown feature, or implications that form a cycle.
        """
        return self._derive(self._groups, self._features, implies, self._removed)

    def union(self, other: FeatureRegistry) -> FeatureRegistry:
        """The features of both registries: this one's ids stay, and the other's additional features follow.

        A feature that was removed here but exists there gets its old id again. If both say what a feature implies,
        this registry's version counts.

        Raises:
            FeatureError: implications that form a cycle together.
        """
        known = set(self._features)
        added = [feature for feature in other.live if feature not in known]
        new = [g for g in other._groups if g not in self._members]
        groups = (*self._groups, *new)
        declared = {**other._implies, **self._implies}
        removed = self._removed.difference(other.live)
        made = self._derive(groups, (*self._features, *added), declared, removed)
        warn_alike(None, groups, set(new))
        by_group: dict[str, set[str]] = {}
        for group, name in added:
            by_group.setdefault(group, set()).add(name)
        for group, names in by_group.items():
            warn_alike(group, made.names(group), names)
        return made

    def encode(
        self,
        rows: Iterable[Row],
        unknown: Unknown = "error",
        *,
        width: int | None = None,
        group_weights: Mapping[str, float] | None = None,
    ) -> Routing:
        """The routing of a batch: see :func:`flix.core.features.encoding.encode`."""
        return encode(self, rows, unknown, width=width, group_weights=group_weights)


__all__ = ["EVERY", "Feature", "FeatureRegistry"]
