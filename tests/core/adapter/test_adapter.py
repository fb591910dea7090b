"""Adapters as data."""

from __future__ import annotations

import numpy as np
import pytest

from flix import Adapter, AdapterError, FeatureRegistry, FlixConfig, TargetError
from flix.core.adapter.adapter import LayerShape, checked_pairs, expected_tensors
from flix.core.config.targets import LayerInfo

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


def test_sizes_as_users_give_them():
    assert (
        LayerShape.of("q", (5, np.int64(3)))
        == LayerShape.of("q", [5, 3, "linear"])
        == LayerShape(5, 3)
    )
    assert LayerShape.of("e", (7, 4, "embedding")) == LAYERS["emb"]
    assert LayerShape.of("e", LAYERS["emb"]) is LAYERS["emb"]


@pytest.mark.parametrize(
    "sizes", [(3,), 3, (3, -1), (3, "x"), (3, 4, "conv"), (3, 4, "linear", 1), None]
)
def test_sizes_of_another_form_are_refused(sizes):
    with pytest.raises(TargetError, match=r"layer 'q': sizes are \(d_in, d_out\)"):
        LayerShape.of("q", sizes)


def test_renaming_that_gives_no_path_is_refused():
    for rename, message in (
        (5, "rename must be a mapping of layer paths or a callable, got 5"),
        ({"a.q": ""}, "rename must give a layer path, got '' for 'a.q'"),
        (lambda path: None, "rename must give a layer path, got None for 'a.q'"),
    ):
        with pytest.raises(AdapterError, match=message):
            adapter().renamed(rename)


def test_the_shape_of_a_layer_that_a_backend_told_of():
    info = LayerInfo("q", "linear", 5, 3, experts=4, active=2)
    assert LayerShape.told(info) == LayerShape(5, 3, "linear", 4, 2)


def test_pairs_are_checked_against_layers_and_ranks():
    whole = adapter()
    pairs = {path: {f: whole.pair(path, f) for f in REGISTRY.features} for path in LAYERS}
    found = dict(checked_pairs(whole.config, LAYERS, pairs))
    assert found.keys() == whole.tensors.keys()
    assert all(found[name] is tensor for name, tensor in whole.tensors.items())
    with pytest.raises(AdapterError, match=r"layer 'a\.q' has no pair of task=n\.e\.r"):
        gone = {f: p for f, p in pairs["a.q"].items() if f != ("task", "n.e.r")}
        checked_pairs(whole.config, LAYERS, {**pairs, "a.q": gone})
    a, b = pairs["emb"]["language", "hau"]
    with pytest.raises(AdapterError, match=r"layer 'emb': the pair of language=hau must have the shapes \[2, 7\] and \[4, 2\], got \[7, 2\]"):  # fmt: skip
        wrong = {**pairs["emb"], ("language", "hau"): (a.T, b)}
        checked_pairs(whole.config, LAYERS, {**pairs, "emb": wrong})
