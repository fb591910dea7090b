"""Ranks that some layers have of their own (``rank_pattern``): which patterns match a layer, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from flix.core.config.patterns import compiled, effort, is_spelled_out
from flix.core.errors import ConfigError
from flix.core.features.names import Feature

V = TypeVar("V")
# What a file may ask to be worked out before its tensors are looked at; far above what anybody writes.
_MOST_PATTERNS = 2_000
_MOST_RANKS = 4_000_000
_MOST_TRIED, _MOST_EFFORT = 5_000_000, 30_000_000


class Overrides:
    """Patterns and the ranks that each gives; the first that matches a layer and names a feature counts.

    Args:
        patterns: with the ranks of the features that each names.

    Raises:
        ConfigError: a pattern that is none, or more patterns or ranks than anybody needs.
    """

    def __init__(self, patterns: Sequence[tuple[str, Mapping[Feature, int]]]) -> None:
        self.patterns = tuple(patterns)
        self._fits = [compiled(p, "rank_pattern", ending=True) for p, _ in self.patterns]
        self._tried = sum(not is_spelled_out(p) for p, _ in self.patterns)
        if self._tried > _MOST_PATTERNS:
            raise ConfigError(f"rank_pattern has more than {_MOST_PATTERNS:,} patterns")
        self._matching: dict[str, tuple[int, ...]] = {}
        self._ranks: dict[tuple[int, ...], dict[Feature, int]] = {}

    @staticmethod
    def check_count(ranks: int) -> None:
        """Refuse more ranks than anybody needs."""
        if ranks > _MOST_RANKS:
            raise ConfigError(f"rank_pattern gives more than {_MOST_RANKS:,} ranks")

    def matching(self, layer: str) -> tuple[int, ...]:
        """The patterns that match a layer. Kept: with many layers and patterns, matching again would show."""
        if layer not in self._matching:
            found = tuple(i for i, fits in enumerate(self._fits) if fits(layer))
            self._matching[layer] = found
        return self._matching[layer]

    def ranks(self, layer: str) -> dict[Feature, int]:
        """What the patterns say of a layer."""

        def make() -> dict[Feature, int]:
            found: dict[Feature, int] = {}
            for i in reversed(self.matching(layer)):
                found.update(self.patterns[i][1])
            return found

        return self.once(self._ranks, layer, make)

    def once(self, kept: dict[tuple[int, ...], V], layer: str, make: Callable[[], V]) -> V:
        """What is the same for all layers that the same patterns match."""
        key = self.matching(layer)
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def check_size(self, layers: Iterable[str], features: int) -> None:
        """Refuse what takes long to work out for these layers.

        Args:
            layers: their paths.
            features: how many there are.

        Raises:
            ConfigError: very many patterns, or ranks of very many features that differ between very many layers.
        """
        known: set[tuple[int, ...]] = set()
        before, tried = effort.steps, 0
        for layer in layers:
            tried += self._tried
            if tried > _MOST_TRIED or effort.steps - before > _MOST_EFFORT:
                raise ConfigError(
                    f"rank_pattern has {self._tried:,} patterns, which are too many, or too involved, for so many layers"
                )
            known.add(self.matching(layer))
            if len(known) > 1:
                self.check_count(len(known) * features)
