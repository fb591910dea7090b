"""The configuration of an adapted model (docs/specification.md §4.1): frozen, checked when made, JSON round trip."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Union

from flix.core.checks import finite, is_whole, rate, whole
from flix.core.config.layout import LayerLayout
from flix.core.config.overrides import Overrides, nested
from flix.core.config.patterns import compiled
from flix.core.config.ranks import Rule, applied, by_feature
from flix.core.config.renaming import (
    Translate,
    kept_dropout,
    renamed,
    renamed_fallbacks,
    renamed_patterns,
)
from flix.core.config.targets import ALL_LINEAR, CHANGES_BASE, Patterns
from flix.core.config.wording import check_names, named
from flix.core.errors import ConfigError, FlixError, RankError
from flix.core.features.dropout import FeatureDropout
from flix.core.features.encoding import Unknown, check_policy
from flix.core.features.names import Feature, written
from flix.core.features.registry import FeatureRegistry

SCALINGS = ("lora", "rslora")
INITS = ("uniform", "orthogonal")
Pattern = Mapping[str, Union[float, Mapping[Any, Any]]]
"""Numbers for some layers: ``{pattern: one for all features, or by group or feature}``."""


@named
@dataclass(frozen=True, kw_only=True)
class FlixConfig:
    """What to adapt, with which features and which ranks.

    Attributes:
        registry: the features.
        ranks: a rule of :mod:`flix.ranks`, one rank for all, or ``{(group, feature): rank}``; kept in the last form.
        alpha: numerator of the scale: None (alpha = rank), a number, or numbers by group or feature.
        scaling: ``"lora"``, s = alpha / r; ``"rslora"``, s = alpha / sqrt(r).
        target_modules: ``"all-linear"`` (output heads left out), a regular expression, or a list of suffixes.
        exclude_modules: layers left out, as a regular expression or suffixes.
        rank_pattern: other ranks for some layers: ``{pattern: rank}`` or ``{pattern: {group: rank}}`` or
            ``{pattern: {(group, feature): rank}}``; the pattern is a regular expression for the end of a layer's
            path, and the first pattern that matches and names the feature counts.
        alpha_pattern: other alphas for some layers, in the same forms and with the same rule.
        feature_dropout: dropout for training, or None.
        lora_dropout: the probability, in training, that an entry of a linear layer's input is hidden from the
            features' low-rank maps (docs/specification.md §1.8); the base sees everything. At least 0 and less than
            1.
        unknown: how rows with unknown features are encoded (:func:`flix.core.features.encoding.encode`).
        seed: the seed of the initial values.
        init: how A starts: ``"uniform"``, as in LoRA, or ``"orthogonal"``, with orthonormal rows; B is zero.

    Raises:
        ConfigError, RankError, FeatureError, RoutingError: a value that breaks its rule.
    """

    registry: FeatureRegistry
    ranks: Rule | int | Mapping[Any, Any]
    alpha: float | Mapping[Any, Any] | None = None
    scaling: str = "lora"
    target_modules: Patterns = "all-linear"
    exclude_modules: Patterns = ()
    rank_pattern: Pattern = field(default_factory=dict)
    alpha_pattern: Pattern = field(default_factory=dict)
    feature_dropout: FeatureDropout | None = None
    lora_dropout: float = 0.0
    unknown: Unknown = "error"
    seed: int = 0
    init: str = "uniform"

    def __post_init__(self) -> None:
        if not isinstance(self.registry, FeatureRegistry):
            raise ConfigError(f"registry must be a FeatureRegistry, got {self.registry!r}")
        put = object.__setattr__
        put(self, "ranks", _resolve_ranks(self.registry, self.ranks))
        if self.alpha is not None:
            put(self, "alpha", self._resolve_alpha(self.alpha))
        if self.scaling not in SCALINGS:
            raise ConfigError(f"scaling must be 'lora' or 'rslora', got {self.scaling!r}")
        put(self, "target_modules", _patterns(self.target_modules, "target_modules"))
        put(self, "exclude_modules", _patterns(self.exclude_modules, "exclude_modules", empty=True))
        ranks = Overrides.given(self.registry, self.rank_pattern, "rank_pattern", _rank)
        alphas = Overrides.given(self.registry, self.alpha_pattern, "alpha_pattern", _alpha)
        put(self, "rank_pattern", ranks.plain(self.rank_pattern))
        put(self, "alpha_pattern", alphas.plain(self.alpha_pattern))
        put(self, "_patterns", (ranks, alphas))
        put(self, "_updates", {})
        if self.feature_dropout is not None:
            if not isinstance(self.feature_dropout, FeatureDropout):
                raise ConfigError(
                    f"feature_dropout must be a FeatureDropout or None, got {self.feature_dropout!r}"
                )
            self.feature_dropout.check(self.registry)
        put(self, "lora_dropout", rate(self.lora_dropout, "lora_dropout", below_one=True))
        check_policy(self.unknown)
        put(self, "seed", whole(self.seed, "seed"))
        if self.init not in INITS:
            raise ConfigError(_no_start(self.init))

    def _resolve_alpha(self, alpha: object) -> float | dict[Feature, float]:
        if isinstance(alpha, Mapping):
            values = by_feature(self.registry, alpha, "alpha")
            return {
                f: finite(value, f"alpha of {written(f)}", positive=True)
                for f, value in values.items()
            }
        return finite(alpha, "alpha", positive=True)

    def rank(self, layer: str, feature: Feature) -> int:
        """The rank of a feature in a layer: from ``rank_pattern`` if a pattern matches, else from ``ranks``."""
        if (rank := self._ranks.numbers(layer).get(feature)) is not None:
            return rank
        return int(self.ranks[feature])  # type: ignore[index]

    def layer_ranks(self, layer: str) -> tuple[int, ...]:
        """The ranks of all features in a layer, in the order of their ids."""
        ranks = {**self.ranks, **self._ranks.numbers(layer)}  # type: ignore[dict-item]
        return tuple(ranks[f] for f in self.registry.features)

    def updates(self, layer: str) -> tuple[tuple[int, int], ...]:
        """Id and rank of the features that have an update in a layer, in the order of their ids."""
        kept: dict[tuple[int, ...], tuple[tuple[int, int], ...]] = self._updates  # type: ignore[attr-defined]
        return self._ranks.once(
            kept,
            layer,
            lambda: tuple((i, r) for i, r in enumerate(self.layer_ranks(layer)) if r),
        )

    def check_size(self, layers: Iterable[str]) -> None:
        """Refuse patterns of ranks or alphas that take long to evaluate for these layers.

        Raises:
            ConfigError: they do.
        """
        paths = list(layers)
        self._ranks.check_size(paths, len(self.registry))
        self._alphas.check_size(paths, len(self.registry))

    @property
    def _ranks(self) -> Overrides[int]:
        return self._patterns[0]  # type: ignore[attr-defined, no-any-return]

    @property
    def _alphas(self) -> Overrides[float]:
        return self._patterns[1]  # type: ignore[attr-defined, no-any-return]

    def layer_alpha(self, layer: str, feature: Feature) -> float | None:
        """A feature's alpha in a layer, from ``alpha_pattern`` or else from ``alpha``; None for the rank."""
        alpha = self._alphas.numbers(layer).get(feature)
        return self.general_alpha(feature) if alpha is None else alpha

    def general_alpha(self, feature: Feature) -> float | None:
        """A feature's alpha in layers without a matching ``alpha_pattern``; None for the rank."""
        if isinstance(self.alpha, Mapping):
            return self.alpha.get(feature)
        return None if self.alpha is None else float(self.alpha)

    def scale(self, layer: str, feature: Feature) -> float:
        """s_f (docs/specification.md §1.2) in a layer; 0 if the feature has rank 0."""
        rank = self.rank(layer, feature)
        if rank == 0:
            return 0.0
        alpha = self.layer_alpha(layer, feature)
        return (rank if alpha is None else alpha) / (
            rank if self.scaling == "lora" else math.sqrt(rank)
        )

    def layout(self, layer: str) -> LayerLayout:
        """Ranks and scales of all features in a layer, in the order of their ids."""
        features = self.registry.features
        return LayerLayout(
            ranks=self.layer_ranks(layer),
            scales=tuple(self.scale(layer, f) for f in features),
        )

    def layouts(self, layers: Iterable[str]) -> dict[str, LayerLayout]:
        """The layout of each layer; equal layouts are one object, so that layers share what is made for it."""
        known: dict[LayerLayout, LayerLayout] = {}
        found = ((layer, self.layout(layer)) for layer in layers)
        return {layer: known.setdefault(layout, layout) for layer, layout in found}

    def with_feature(
        self,
        group: str,
        name: str,
        *,
        rank: int,
        alpha: float | None = None,
        implies: Sequence[Feature] = (),
    ) -> FlixConfig:
        """The configuration with one more feature; every other id, rank and scale stays.

        Args:
            group: a group of the registry.
            name: the new feature.
            rank: its rank.
            alpha: its alpha; default: the configuration's alpha if that is one number, or the alpha that all features
                of its group have; else its rank.
            implies: features that it implies.

        Raises:
            FeatureError: unknown group, or a name that exists already.
            RankError: an ill-formed rank.
        """
        registry = self.registry.with_feature(group, name, implies)
        feature = group, name = registry.features[registry.id(group, name)]
        ranks = {**self.ranks, feature: whole(rank, "rank", 0, RankError)}  # type: ignore[dict-item]
        alphas = self.alpha
        if alpha is None and isinstance(alphas, Mapping):
            shared = {alphas.get((group, other)) for other in self.registry.names(group)}
            alpha = shared.pop() if len(shared) == 1 else None
        if alpha is not None:
            known = self.registry.live
            if isinstance(alphas, Mapping):
                alphas = {**alphas}
            elif alphas is not None:
                alphas = dict.fromkeys(known, alphas)
            else:
                alphas = {}
            alphas[feature] = alpha
        return replace(self, registry=registry, ranks=ranks, alpha=alphas)

    def without_feature(self, group: str, name: str) -> FlixConfig:
        """The configuration without one feature; every other id, rank and scale stays.

        Raises:
            FeatureError: no such feature, or the last of its group.
        """
        registry = self.registry.without_feature(group, name)
        return self._translated(registry, lambda f: None if f in registry.removed else f)

    def with_renamed(self, group: str, name: str, new: str) -> FlixConfig:
        """The configuration with another name for one feature; every id, rank and scale stays.

        Raises:
            FeatureError: no such feature, or a new name that is ill-formed or taken.
        """
        registry = self.registry.renamed(group, name, new)
        names = dict(zip(self.registry.features, registry.features, strict=True))
        return self._translated(registry, lambda f: names.get(f, f))

    def subset(self, features: Iterable[Feature]) -> FlixConfig:
        """The configuration of some features and of those that they imply.

        Raises:
            FeatureError: an unknown feature, or none at all.
        """
        registry = self.registry.subset(features)
        return self._translated(registry, lambda f: f if f in registry else None)

    def _translated(self, registry: FeatureRegistry, translate: Translate) -> FlixConfig:
        """What is said of features, under their new names; None for features that are gone."""
        alpha: Any = self.alpha
        return replace(
            self,
            registry=registry,
            ranks=renamed(self.ranks, translate),  # type: ignore[arg-type]
            alpha=renamed(alpha, translate) if isinstance(alpha, Mapping) else alpha,
            rank_pattern=renamed_patterns(self.rank_pattern, registry, translate),
            alpha_pattern=renamed_patterns(self.alpha_pattern, registry, translate),
            unknown=renamed_fallbacks(self.unknown, self.registry, registry, translate),
            feature_dropout=kept_dropout(self.feature_dropout, registry),
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; :meth:`from_dict` gives an equal configuration."""
        return {
            "registry": self.registry.to_dict(),
            "ranks": nested({f: self.ranks[f] for f in self.registry.live}),  # type: ignore[index]
            "alpha": nested(self.alpha) if isinstance(self.alpha, Mapping) else self.alpha,
            "scaling": self.scaling,
            "target_modules": _plain(self.target_modules),
            "exclude_modules": _plain(self.exclude_modules),
            "rank_pattern": dict(self.rank_pattern),
            # Left out where there is none: versions from before it read such files.
            **({"alpha_pattern": dict(self.alpha_pattern)} if self.alpha_pattern else {}),
            **({"lora_dropout": self.lora_dropout} if self.lora_dropout else {}),
            "feature_dropout": self.feature_dropout.to_dict() if self.feature_dropout else None,
            "unknown": _plain_unknown(self.unknown),
            "seed": self.seed,
            **({"init": self.init} if self.init != "uniform" else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FlixConfig:
        """The configuration that :meth:`to_dict` described.

        Raises:
            ConfigError: missing or unknown keys, or a value that breaks its rule.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"a configuration is a mapping of its fields, got {type(data).__name__}"
            )
        check_names(data, [f.name for f in fields(cls)])
        if missing := [name for name in ("registry", "ranks") if name not in data]:
            raise ConfigError(f"a configuration needs the field {missing[0]!r}")
        values = dict(data)
        try:
            values["registry"] = FeatureRegistry.from_dict(values["registry"])
            if values.get("feature_dropout") is not None:
                values["feature_dropout"] = FeatureDropout(**values["feature_dropout"])
            return cls(**values)
        except FlixError:
            raise
        except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
            raise ConfigError(f"a configuration with a value of the wrong form: {error}") from error


def _resolve_ranks(registry: FeatureRegistry, ranks: object) -> dict[Feature, int]:
    if callable(ranks):
        ranks = applied(ranks, registry)
    if is_whole(ranks):
        ranks = dict.fromkeys(registry.live, ranks)
    if not isinstance(ranks, Mapping):
        raise ConfigError(
            "ranks must be a rule (of flix.ranks, or a function of the registry), one rank, or "
            f"{{(group, feature): rank}}, got {ranks!r}"
        )
    # A removed feature keeps its id, and rank 0 under it.
    given = {key: rank for key, rank in ranks.items() if key not in registry.removed}
    found = by_feature(registry, given, "ranks")
    for feature in registry.live:
        if feature not in found:
            raise ConfigError(f"ranks must cover every feature; {written(feature)} has none")
    found.update(dict.fromkeys(registry.removed, 0))
    return {
        f: whole(found[f], f"the rank of {written(f)}", 0, RankError) for f in registry.features
    }


def _patterns(value: object, what: str, empty: bool = False) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        if value != ALL_LINEAR:
            compiled(value, what)
        return value
    if isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(item, str) and item for item in value
    ):
        if value or empty:
            return tuple(value)
        raise ConfigError(f"{what} must name at least one layer, got none")
    raise ConfigError(f"{what} must be a string or a list of suffixes, got {value!r}")


def _no_start(init: object) -> str:
    said = f"init must be 'uniform' or 'orthogonal', got {init!r}"
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        said += (
            ": such a start moves a part of the base's kernels into one adapter, and the base would change for rows "
            "without it, too"
        )
    return said


def _rank(value: object, what: str) -> int:
    return whole(value, what, 0, RankError)


def _alpha(value: object, what: str) -> float:
    return finite(value, what, positive=True)


def _plain(patterns: Patterns) -> str | list[str]:
    return patterns if isinstance(patterns, str) else list(patterns)


def _plain_unknown(unknown: Unknown) -> Any:
    if isinstance(unknown, str):
        return unknown
    return {k: v if isinstance(v, str) else list(v) for k, v in unknown.items()}
