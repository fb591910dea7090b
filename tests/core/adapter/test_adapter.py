"""Adapters as data."""

from __future__ import annotations

import numpy as np
import pytest

from flix import Adapter, AdapterError, FeatureRegistry, FlixConfig
from flix.core.adapter.adapter import LayerShape, expected_tensors

REGISTRY = FeatureRegistry({"language": ["hau", "swa"], "task": ["n.e.r", "ñ ü"]})
LAYERS = {"a.q": LayerShape(5, 3), "emb": LayerShape(7, 4, "embedding")}


def adapter(dtype=np.float32, **changes) -> Adapter:
    settings = {"ranks": {"language": {"hau": 2, "swa": 0}, "task": 3}, **changes}
    config = FlixConfig(registry=REGISTRY, **settings)
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(dtype) for n, s in expected_tensors(config, LAYERS)}
    return Adapter(config, LAYERS, tensors)


def test_wrong_dtypes_are_refused():
    good = adapter()
    tensors = {**good.tensors, "emb.A.language.hau": np.zeros((2, 7), np.int64)}
    with pytest.raises(AdapterError, match=r"'emb.A.language.hau' must be float16.*got int64"):
        Adapter(good.config, LAYERS, tensors)


def test_rename():
    original = adapter(rank_pattern={"a.q": {"task": 1}})
    renamed = original.renamed({"a.q": "block.query"})
    assert list(renamed.layers) == ["block.query", "emb"]
    for feature in REGISTRY.features:
        assert renamed.config.layout("block.query") == original.config.layout("a.q")
        for got, expected in zip(renamed.pair("block.query", feature), original.pair("a.q", feature), strict=True):  # fmt: skip
            np.testing.assert_array_equal(got, expected)
    assert list(original.renamed(str.upper).layers) == ["A.Q", "EMB"]
    with pytest.raises(AdapterError, match=r"'a.p', which is not adapted \(did you mean 'a.q'"):
        original.renamed({"a.p": "x"})
    with pytest.raises(AdapterError, match="path 'x' to two layers"):
        original.renamed(lambda _: "x")
