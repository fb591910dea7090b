"""Compositions of features as matrices: what merging and exporting need, in numpy."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import Adapter
from flix.core.config.config import FlixConfig
from flix.core.errors import RoutingError, listed
from flix.core.features.encoding import Row
from flix.core.features.names import Feature, written

Composition = tuple[tuple[Feature, float], ...]
"""Active features with their weights."""


def composition(config: FlixConfig, row: Row) -> Composition:
    """The features that one row activates, implied ones included, under the configuration's policy.

    Raises:
        FeatureError, RoutingError: as for encoding.
        RoutingError: the row activates nothing.
    """
    routing = config.registry.encode([row], unknown=config.unknown)
    active = tuple(routing.names(0).items())
    if not active:
        raise RoutingError(f"a composition needs at least one feature, but {row!r} activates none")
    return active


def lora_pair(
    adapter: Adapter, layer: str, active: Composition
) -> tuple[NDArray[Any], NDArray[Any]]:
    """One low-rank pair that equals the composition in a layer: A = [A_f], B = [w_f s_f B_f], stacked.

    Returns:
        A ``[r, d_in]`` and B ``[d_out, r]`` with r the sum of the active ranks, and scale 1; B in float64. A layer of E
        experts has ``[E, r, d_in]`` and ``[E, d_out, r]``.
    """
    pairs = [(adapter.pair(layer, feature), feature, weight) for feature, weight in active]
    a = np.concatenate([pair[0] for pair, _, _ in pairs], axis=-2)
    b = np.concatenate(
        [
            pair[1].astype(np.float64) * (weight * adapter.config.scale(layer, feature))
            for pair, feature, weight in pairs
        ],
        axis=-1,
    )
    return a, b


def delta(adapter: Adapter, layer: str, active: Composition) -> NDArray[np.float64]:
    """The composition's update of a layer's kernel, Σ w_f s_f B_f A_f: float64 ``[d_out, d_in]``, with E in front."""
    a, b = lora_pair(adapter, layer, active)
    result: NDArray[np.float64] = b @ a.astype(np.float64)
    return result


def untrained(adapter: Adapter) -> list[Feature]:
    """The features whose update is zero in every layer that they have a rank in: none was ever trained."""
    found = []
    for feature in adapter.config.registry.live:
        pairs = [adapter.pair(path, feature)[1] for path in adapter.layers]
        if any(b.size for b in pairs) and not any(b.any() for b in pairs):
            found.append(feature)
    return found


def untrained_note(features: Collection[Feature]) -> str:
    """How it is said."""
    names = listed(map(written, features))
    if len(features) == 1:
        return f"{names} was never trained: its update is zero and changes nothing"
    return f"{names} were never trained: their updates are zero and change nothing"
