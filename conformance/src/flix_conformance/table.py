"""The kit's own account of a model's features: ids, scales, implications. Nothing of it is read from flix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Feature = tuple[str, str]


def written(feature: Feature) -> str:
    """A feature as messages must show it (docs/specification.md §7.2)."""
    return "=".join(feature)


@dataclass(frozen=True)
class Table:
    """What is known of a model's features, by the rules of docs/specification.md §1.2 and §2.

    Attributes:
        features: by id; those that were removed keep their places.
        alpha: of every feature that has none of its own; None stands for its rank.
        alphas: by feature.
        scales: of features that came with a scale from elsewhere.
        scaling: ``"lora"`` or ``"rslora"``.
        implies: by feature, or by ``(group, "*")``.
        gone: the features that were removed.
        seed: of the initial values.
    """

    features: tuple[Feature, ...]
    alpha: float | None = None
    alphas: Mapping[Feature, float] = field(default_factory=dict)
    scales: Mapping[Feature, float] = field(default_factory=dict)
    scaling: str = "lora"
    implies: Mapping[Feature, Sequence[Feature]] = field(default_factory=dict)
    gone: frozenset[Feature] = frozenset()
    seed: int = 0

    @classmethod
    def of(
        cls,
        names: Mapping[str, Sequence[str]],
        *,
        alpha: Any = None,
        scaling: str = "lora",
        implies: Mapping[Feature, Sequence[Feature]] | None = None,
        seed: int = 0,
    ) -> Table:
        """From what a registry and a configuration are made of.

        Args:
            names: by group, in the order of their ids.
            alpha: None, a number, or numbers by group or by feature.
            scaling: ``"lora"`` or ``"rslora"``.
            implies: as the registry's.
            seed: of the initial values.
        """
        features = tuple((group, name) for group, own in names.items() for name in own)
        own = alpha if isinstance(alpha, Mapping) else {}
        alphas = {f: own[key] for f in features for key in (f[0], f) if key in own}
        number = None if isinstance(alpha, Mapping) else alpha
        return cls(features, number, alphas, scaling=scaling, implies=implies or {}, seed=seed)

    def __len__(self) -> int:
        return len(self.features)

    @property
    def live(self) -> tuple[Feature, ...]:
        """The features that rows may name, by id."""
        return tuple(f for f in self.features if f not in self.gone)

    @property
    def ids(self) -> dict[Feature, int]:
        """The ids that rows may name."""
        return {f: number for number, f in enumerate(self.features) if f not in self.gone}

    @property
    def groups(self) -> tuple[str, ...]:
        """In the order of registration."""
        return tuple(dict.fromkeys(group for group, _ in self.features))

    def names(self, group: str) -> tuple[str, ...]:
        """Of a group's features, by id."""
        return tuple(name for own, name in self.live if own == group)

    def scale(self, feature: Feature, rank: int) -> float:
        """s_f = alpha / r, or alpha / sqrt(r)."""
        if feature in self.scales:
            return self.scales[feature]
        alpha = self.alphas.get(feature, self.alpha)
        numerator = float(rank if alpha is None else alpha)
        return numerator / (rank if self.scaling == "lora" else math.sqrt(rank))

    def added(self, feature: Feature, scale: float | None = None) -> Table:
        """With one more feature, whose alpha is the one that its whole group has been given."""
        shared = {self.alphas.get(f) for f in self.live if f[0] == feature[0]}
        alpha = shared.pop() if len(shared) == 1 else None
        return replace(
            self,
            features=(*self.features, feature),
            alphas=self.alphas if alpha is None else {**self.alphas, feature: alpha},
            scales=self.scales if scale is None else {**self.scales, feature: scale},
        )

    def renamed(self, old: Feature, name: str) -> Table:
        """With another name for one feature."""

        def new(feature: Feature) -> Feature:
            return (old[0], name) if feature == old else feature

        return replace(
            self,
            features=tuple(map(new, self.features)),
            alphas={new(f): a for f, a in self.alphas.items()},
            scales={new(f): s for f, s in self.scales.items()},
            implies={new(f): tuple(map(new, targets)) for f, targets in self.implies.items()},
        )

    def removed(self, feature: Feature) -> Table:
        """Without one feature: it implies nothing and is implied by none."""
        implies = {
            source: tuple(t for t in targets if t != feature)
            for source, targets in self.implies.items()
            if source != feature
        }
        return replace(self, implies=implies, gone=self.gone | {feature})
