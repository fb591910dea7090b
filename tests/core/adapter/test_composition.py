"""Compositions, and the update that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from flix import Adapter, FeatureRegistry, FlixConfig, RoutingError
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.composition import (
    composition,
    delta,
    lora_pair,
    untrained,
    untrained_note,
)

REGISTRY = FeatureRegistry({"language": ["hau", "swa"], "task": ["n.e.r", "ñ ü"]})
LAYERS = {"a.q": LayerShape(5, 3), "emb": LayerShape(7, 4, "embedding")}


def adapter(dtype=np.float32, **changes) -> Adapter:
    settings = {"ranks": {"language": {"hau": 2, "swa": 0}, "task": 3}, **changes}
    config = FlixConfig(registry=REGISTRY, **settings)
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(dtype) for n, s in expected_tensors(config, LAYERS)}
    return Adapter(config, LAYERS, tensors)


def test_compositions():
    original = adapter(alpha=2.0)
    active = composition(original.config, {"language": {"hau": 0.5, "swa": 3}, "task": "n.e.r"})
    expected = np.zeros((3, 5))
    for feature, weight in active:
        a, b = original.pair("a.q", feature)
        expected += weight * original.config.scale("a.q", feature) * b.astype(float) @ a
    np.testing.assert_allclose(delta(original, "a.q", active), expected, rtol=1e-12)
    a, b = lora_pair(original, "a.q", active)
    assert a.shape == (5, 5) and b.shape == (3, 5)


def test_a_row_that_activates_nothing_is_no_composition():
    with pytest.raises(
        RoutingError, match=r"a composition needs at least one feature, but {} activ"
    ):
        composition(adapter().config, {})
    config = FlixConfig(registry=REGISTRY, ranks=1, unknown="skip")
    with pytest.raises(RoutingError, match="activates none"):
        composition(config, {"language": "yor"})


def test_features_whose_update_is_zero_everywhere_were_never_trained():
    whole = adapter()
    assert untrained(whole) == []
    zero = {
        name: np.zeros_like(t) if ".B." in name and "hau" in name else t
        for name, t in whole.tensors.items()
    }
    # swa has no rank anywhere, and so nothing that could be trained.
    found = untrained(Adapter(whole.config, LAYERS, zero))
    assert found == [("language", "hau")]
    assert untrained_note(found) == "language=hau was never trained: its update is zero and changes nothing"  # fmt: skip
    assert untrained_note([*found, ("task", "n.e.r")]) == (
        "language=hau, task=n.e.r were never trained: their updates are zero and change nothing"
    )
    once = {**zero, "emb.B.language.hau": whole.tensors["emb.B.language.hau"]}
    assert untrained(Adapter(whole.config, LAYERS, once)) == []
