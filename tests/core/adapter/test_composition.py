"""Compositions, and the update that they stand for."""

from __future__ import annotations

import numpy as np

from flix import Adapter, FeatureRegistry, FlixConfig
from flix.core.adapter.adapter import LayerShape, expected_tensors
from flix.core.adapter.composition import composition, delta, lora_pair

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
