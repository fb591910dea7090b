"""Norms and cosines of updates, held to dense products."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flix import Adapter, FeatureRegistry, FlixConfig
from flix.core.adapter import similarity
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.similarity import cosines, inner_products, update_norms
from flix.core.errors import AdapterError

REGISTRY = FeatureRegistry({"language": ["hau", "swa", "yor"], "task": ["ner", "pos"]})
LAYERS = {
    "a.q": LayerShape(7, 5),
    "emb": LayerShape(11, 4, "embedding"),
    "experts": LayerShape(6, 3, experts=2),
}


def made(dtype: type = np.float64) -> Adapter:
    """Unequal ranks, one of them 0, and scales other than 1."""
    ranks = {"language": {"hau": 1, "swa": 3, "yor": 0}, "task": 2}
    config = FlixConfig(registry=REGISTRY, ranks=ranks, alpha={"task": 3.0, "language": 0.5})
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(dtype) for n, s in expected_tensors(config, LAYERS)}
    return Adapter(config, LAYERS, tensors)


def dense(adapter: Adapter, layer: str) -> list[np.ndarray]:
    """The updates s B A, in full."""
    found = []
    for feature in REGISTRY.live:
        a, b = adapter.pair(layer, feature)
        scale = adapter.config.scale(layer, feature) if a.shape[-2] else 0.0
        found.append(scale * (b.astype(np.float64) @ a.astype(np.float64)).ravel())
    return found


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("slots", [1, 3, 1024])
def test_inner_products_are_those_of_the_dense_updates(
    layer: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "_SLOTS", slots)
    adapter = made()
    updates = dense(adapter, layer)
    found = inner_products(adapter, layer, REGISTRY.live)
    for i, j in itertools.product(range(len(updates)), repeat=2):
        assert found[i, j] == pytest.approx(updates[i] @ updates[j], rel=1e-12, abs=1e-12)
    chosen = [REGISTRY.live[4], REGISTRY.live[2], REGISTRY.live[0]]
    np.testing.assert_allclose(
        inner_products(adapter, layer, chosen), found[np.ix_([4, 2, 0], [4, 2, 0])], rtol=1e-12
    )


def test_cosines_are_those_of_the_dense_updates_and_nan_without_an_update() -> None:
    adapter = made(np.float32)
    total = sum(inner_products(adapter, layer, REGISTRY.live) for layer in LAYERS)
    found = cosines(total)
    whole = [np.concatenate(parts) for parts in zip(*(dense(adapter, p) for p in LAYERS), strict=True)]  # fmt: skip
    for i, j in itertools.product(range(5), repeat=2):
        if 2 in (i, j):  # rank 0
            assert np.isnan(found[i, j])
        else:
            expected = whole[i] @ whole[j] / np.linalg.norm(whole[i]) / np.linalg.norm(whole[j])
            assert found[i, j] == pytest.approx(expected, abs=1e-6)
    assert np.diagonal(found)[[0, 1, 3, 4]] == pytest.approx(1.0)


def test_norms_are_those_of_the_dense_updates() -> None:
    adapter = made()
    for layer in LAYERS:
        found = [update_norms(adapter)[feature][layer] for feature in REGISTRY.live]
        expected = [np.linalg.norm(update) for update in dense(adapter, layer)]
        assert found == pytest.approx(expected, rel=1e-12)
        squares = np.diagonal(inner_products(adapter, layer, REGISTRY.live))
        assert np.sqrt(squares) == pytest.approx(expected, rel=1e-12)


def test_a_layer_that_is_not_adapted_is_named() -> None:
    with pytest.raises(AdapterError, match=r"layer 'a\.k' is not adapted"):
        inner_products(made(), "a.k", REGISTRY.live)


def test_no_features_and_none_with_a_rank() -> None:
    assert inner_products(made(), "a.q", []).shape == (0, 0)
    assert inner_products(made(), "a.q", [("language", "yor")]).tolist() == [[0.0]]
