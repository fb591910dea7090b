"""What a configuration says of features, under other names or without some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from flix.core.features.dropout import FeatureDropout
from flix.core.features.encoding import Unknown
from flix.core.features.names import Feature
from flix.core.features.table import FeatureTable

Translate = Callable[[Feature], Feature | None]
"""The feature's new name; None for a feature that is gone."""

V = TypeVar("V")


def renamed(values: Mapping[Feature, V], translate: Translate) -> dict[Feature, V]:
    """Values by feature under the new names, without those of features that are gone."""
    found = {}
    for feature, value in values.items():
        new = translate(feature)
        if new is not None:
            found[new] = value
    return found


def renamed_patterns(
    patterns: Mapping[str, Any], registry: FeatureTable, translate: Translate
) -> dict[str, Any]:
    """A ``rank_pattern`` or ``alpha_pattern`` under the new names; see :func:`renamed_pattern`."""
    return {p: renamed_pattern(given, registry, translate) for p, given in patterns.items()}


def renamed_pattern(numbers: Any, registry: FeatureTable, translate: Translate) -> Any:
    """The numbers of one pattern under the new names.

    Args:
        numbers: one for all features, or ``{group: one, or {name: number}}``.
        registry: the new one.
        translate: the features' new names.
    """
    if not isinstance(numbers, Mapping):
        return numbers
    found: dict[str, Any] = {}
    for group, value in numbers.items():
        if not isinstance(value, Mapping):
            if group in registry.groups:
                found[group] = value
            continue
        given = {(group, name): number for name, number in value.items()}
        for (new_group, name), number in renamed(given, translate).items():
            found.setdefault(new_group, {})[name] = number
    return found


def renamed_fallbacks(
    unknown: Unknown, old: FeatureTable, new: FeatureTable, translate: Translate
) -> Unknown:
    """The policy for unknown features under the new names; ``"error"`` where no fallback is left.

    Fallbacks are names without a group: a name goes on to mean the features that still have it.
    """
    if isinstance(unknown, str):
        return unknown
    names: dict[str, str | None] = {}
    for feature in old.live:
        translated = translate(feature)
        names[feature[1]] = None if translated is None else translated[1]
    for feature in new.live:
        if feature in old:
            names[feature[1]] = feature[1]
    kept: dict[str, list[str]] = {}
    for name, given in unknown.items():
        known = [given] if isinstance(given, str) else given
        found = [names.get(fallback, fallback) for fallback in known]
        if left := [fallback for fallback in found if fallback is not None]:
            kept[name] = left
    return kept or "error"


def kept_dropout(dropout: FeatureDropout | None, registry: FeatureTable) -> FeatureDropout | None:
    """Feature dropout without the rates of groups that are gone."""
    if dropout is None:
        return None
    rates = {group: rate for group, rate in dropout.per_group.items() if group in registry.groups}
    return replace(dropout, per_group=rates)
