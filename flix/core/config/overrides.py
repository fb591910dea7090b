"""Ranks and alphas that some layers have of their own (``rank_pattern``, ``alpha_pattern``): which patterns match a
layer, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from flix.core.config.patterns import compiled, effort, is_spelled_out
from flix.core.config.ranks import by_feature
from flix.core.errors import ConfigError
from flix.core.features.names import Feature, normal
from flix.core.features.registry import FeatureRegistry

V = TypeVar("V")
N = TypeVar("N", int, float)
# What a file may ask to be worked out before its tensors are looked at; far above what anybody writes.
_MOST_PATTERNS = 2_000
_MOST_RANKS = 4_000_000
_MOST_TRIED, _MOST_EFFORT = 5_000_000, 30_000_000


class Overrides(Generic[N]):
    """Patterns and the numbers that each gives; the first that matches a layer and names a feature counts.

    Args:
        patterns: with the numbers of the features that each names.
        name: the field that they are, for messages.

    Raises:
        ConfigError: a pattern that is none, or more patterns or numbers than anybody needs.
    """

    def __init__(
        self, patterns: Sequence[tuple[str, Mapping[Feature, N]]], name: str = "rank_pattern"
    ) -> None:
        self.patterns: tuple[tuple[str, Mapping[Feature, N]], ...] = tuple(patterns)
        self.name = name
        self._fits = [compiled(p, name, ending=True) for p, _ in self.patterns]
        self._tried = sum(not is_spelled_out(p) for p, _ in self.patterns)
        if self._tried > _MOST_PATTERNS:
            raise ConfigError(f"{name} has more than {_MOST_PATTERNS:,} patterns")
        self._matching: dict[str, tuple[int, ...]] = {}
        self._found: dict[tuple[int, ...], dict[Feature, N]] = {}

    @classmethod
    def given(
        cls, registry: FeatureRegistry, given: Any, name: str, number: Callable[[Any, str], N]
    ) -> Overrides[N]:
        """What a configuration's field says.

        Args:
            registry: the features.
            given: ``{pattern: number, or numbers by feature}``.
            name: the field.
            number: gives a checked number; it takes what was given, and what that is, for messages.

        Raises:
            ConfigError, RankError, FeatureError: it has another form, or names what there is not.
        """
        noun = _noun(name)
        if not isinstance(given, Mapping):
            raise ConfigError(f"{name} must be {{pattern: {noun} or {noun}s}}, got {given!r}")
        found: list[tuple[str, dict[Feature, N]]] = []
        count = 0
        for pattern, value in given.items():
            what = f"{name}[{pattern!r}]"
            values = (
                by_feature(registry, value, what)
                if isinstance(value, Mapping)
                else dict.fromkeys(registry.live, value)
            )
            found.append((pattern, {f: number(v, what) for f, v in values.items()}))
            count += len(values)
            check_count(count, name)
        return cls(found, name)

    def plain(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The field in the form that files have; ``given`` is what it was made of."""
        pairs = zip(given.values(), self.patterns, strict=True)
        return {pattern: _by_group(value, numbers) for value, (pattern, numbers) in pairs}

    def matching(self, layer: str) -> tuple[int, ...]:
        """The patterns that match a layer. Kept: with many layers and patterns, matching again would show."""
        if layer not in self._matching:
            found = tuple(i for i, fits in enumerate(self._fits) if fits(layer))
            self._matching[layer] = found
        return self._matching[layer]

    def numbers(self, layer: str) -> dict[Feature, N]:
        """What the patterns say of a layer."""

        def make() -> dict[Feature, N]:
            found: dict[Feature, N] = {}
            for i in reversed(self.matching(layer)):
                found.update(self.patterns[i][1])
            return found

        return self.once(self._found, layer, make)

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
            ConfigError: very many patterns, or numbers of very many features that differ between very many layers.
        """
        known: set[tuple[int, ...]] = set()
        before, tried = effort.steps, 0
        for layer in layers:
            tried += self._tried
            if tried > _MOST_TRIED or effort.steps - before > _MOST_EFFORT:
                raise ConfigError(
                    f"{self.name} has {self._tried:,} patterns, which are too many, or too involved, for so many layers"
                )
            known.add(self.matching(layer))
            if len(known) > 1:
                check_count(len(known) * features, self.name)


def check_count(numbers: int, name: str) -> None:
    """Refuse more ranks or alphas than anybody needs."""
    if numbers > _MOST_RANKS:
        raise ConfigError(f"{name} gives more than {_MOST_RANKS:,} {_noun(name)}s")


def _noun(name: str) -> str:
    return name.partition("_")[0]


def nested(values: Mapping[Feature, Any]) -> dict[str, Any]:
    """{(group, feature): v} as {group: {feature: v}}, the form that files have."""
    found: dict[str, Any] = {}
    for (group, name), value in values.items():
        found.setdefault(group, {})[name] = value
    return found


def _by_group(given: Any, numbers: Mapping[Feature, Any]) -> Any:
    """Numbers of a pattern in the form that files have: one, or {group: one, or {name: number}}.

    A group stays as a whole, for features to come, unless some of its features are named.

    Args:
        given: as the user gave them.
        numbers: the same by feature, checked.
    """
    if not isinstance(given, Mapping):
        return next(iter(numbers.values()))
    found = nested(numbers)
    shared: dict[str, Any] = {}
    named: set[str] = set()
    for key, value in given.items():
        if isinstance(key, tuple):
            named.add(normal(key[0], "a group"))
        elif not isinstance(value, Mapping) and normal(key, "a group") in found:
            group = normal(key, "a group")
            shared[group] = _checked(value, found[group])
        elif not isinstance(value, Mapping):  # "group=name"
            named.add(normal(key.partition("=")[0].strip(), "a group"))
    for group in shared.keys() - named:
        found[group] = shared[group]
    return found


def _checked(value: Any, numbers: Mapping[str, Any]) -> Any:
    """A group's own number in the checked numbers' type."""
    return type(next(iter(numbers.values())))(value)
