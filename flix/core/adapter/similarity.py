"""How large the updates of features are and how alike, from A and B alone: no full matrix is formed.

The inner product of two updates is a trace of small products,

    <s_i B_i A_i, s_j B_j A_j>  =  s_i s_j tr((A_j A_iᵀ) (B_iᵀ B_j))  =  s_i s_j Σ (A_i A_jᵀ) ∘ (B_iᵀ B_j),

with the sum over r_i x r_j entries, whatever the layer's sizes are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import Adapter
from flix.core.adapter.composition import lora_pair
from flix.core.features.names import Feature

_SLOTS = 1024  # slots taken against all others at a time: bounds what is held at once


def update_norms(adapter: Adapter) -> dict[Feature, dict[str, float]]:
    """The Frobenius norm of s B A for every feature and layer, from r x r products alone."""
    norms: dict[Feature, dict[str, float]] = {}
    for feature in adapter.config.registry.live:
        norms[feature] = {}
        for layer in adapter.layers:
            a, b = (part.astype(np.float64) for part in adapter.pair(layer, feature))
            squared = float(np.sum((a @ a.swapaxes(-1, -2)) * (b.swapaxes(-1, -2) @ b)))
            norms[feature][layer] = adapter.config.scale(layer, feature) * max(squared, 0.0) ** 0.5
    return norms


def inner_products(
    adapter: Adapter, layer: str, features: Sequence[Feature]
) -> NDArray[np.float64]:
    """The inner products of features' updates in a layer, each with each.

    Args:
        adapter: the adapter.
        layer: the layer's path. A layer of experts counts as one map: the sum over its experts.
        features: whose updates; one of rank 0 there has the update 0.

    Returns:
        float64 ``[features, features]``; the diagonal holds the squared norms.

    Raises:
        AdapterError: the layer is not adapted.
        FeatureError: no such feature.
    """
    ranks = [adapter.pair(layer, feature)[0].shape[-2] for feature in features]
    active = [number for number, rank in enumerate(ranks) if rank]
    found = np.zeros((len(features), len(features)))
    if not active:
        return found
    a, b = lora_pair(adapter, layer, tuple((features[i], 1.0) for i in active))
    a, b_t = a.astype(np.float64), b.swapaxes(-1, -2)
    starts = np.cumsum([0, *(ranks[i] for i in active)])[:-1]
    slots = a.shape[-2]
    sums = np.empty((slots, len(active)))
    for begin in range(0, slots, _SLOTS):
        part = slice(begin, begin + _SLOTS)
        both = (a[..., part, :] @ a.swapaxes(-1, -2)) * (b_t[..., part, :] @ b)
        both = both.reshape(-1, *both.shape[-2:]).sum(axis=0)  # over experts
        sums[part] = np.add.reduceat(both, starts, axis=1)
    found[np.ix_(active, active)] = np.add.reduceat(sums, starts, axis=0)
    return found


def cosines(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products as cosines, from -1 to 1; NaN where one of the two updates is 0.

    Args:
        products: ``[n, n]`` with the squared norms on the diagonal, as of :func:`inner_products`, of one layer or
            summed over several, which are then one long vector.
    """
    norms = np.sqrt(np.maximum(np.diagonal(products), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = products / np.outer(norms, norms)
    found[~np.isfinite(found)] = np.nan
    return np.asarray(np.clip(found, -1.0, 1.0), np.float64)
