"""The pure halves: counter-based bits, initial values, targets, factors."""

from __future__ import annotations

import numpy as np
import pytest

from flix import FeatureRegistry, FlixConfig, TargetError
from flix.core import rng
from flix.core.adapter.initial import initial_a, initial_b
from flix.core.adapter.lowrank import resized_mean
from flix.core.config.targets import LayerInfo, is_head, select


def test_bits_are_uniform_and_keyed():
    words = rng.key("x", 1)
    u = rng.uniform(words, np.arange(200_000))
    assert u.min() >= 0 and u.max() < 1
    assert np.histogram(u, 10, (0, 1))[0] == pytest.approx(20_000, rel=0.03)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
    assert rng.key("ab", "c") != rng.key("a", "bc")
    assert rng.key(1) != rng.key("1")
    other = rng.uniform(rng.key("x", 2), np.arange(200_000))
    assert abs(np.corrcoef(u, other)[0, 1]) < 0.01


def test_initial_values():
    arguments = {"seed": 0, "layer": "a.q", "group": "task", "feature": "ner", "d_in": 100}
    a = initial_a(rank=64, **arguments)
    assert a.dtype == np.float32 and a.shape == (64, 100)
    assert np.abs(a).max() <= 0.1 and a.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.02)
    np.testing.assert_array_equal(initial_a(rank=8, **arguments), a[:8])
    for change in ({"seed": 1}, {"layer": "a.k"}, {"group": "t"}, {"feature": "n"}):
        assert (initial_a(rank=64, **{**arguments, **change}) != a).mean() > 0.99
    assert not initial_b(rank=3, d_out=5).any()
    # Pinned: a change of these bytes changes every adapter that is trained from a seed.
    head = initial_a(rank=1, **{**arguments, "d_in": 4}).ravel().tolist()
    assert head == PINNED


PINNED = [0.2735711932182312, -0.25617116689682007, 0.182822585105896, 0.24849069118499756]


LAYERS = [
    LayerInfo("model", ""),
    LayerInfo("model.emb", "embedding", 10, 4),
    LayerInfo("model.0.q", "linear", 4, 4),
    LayerInfo("model.0.seq", "linear", 4, 4),
    LayerInfo("model.0.norm", ""),
    LayerInfo("model.0.odd", "", reason="its class has a forward of its own"),
    LayerInfo("head", "linear", 4, 10, head=True),
]


def paths(*arguments):
    return [info.path for info in select(LAYERS, *arguments)]


def test_targets_have_pefts_meaning():
    assert paths("all-linear") == ["model.0.q", "model.0.seq"]
    assert paths(["q"]) == ["model.0.q"]
    assert paths(["0.q", "emb"]) == ["model.emb", "model.0.q"]
    assert paths(r".*\.(q|emb)") == ["model.emb", "model.0.q"]
    assert paths(["head"]) == ["head"]
    assert paths("all-linear", ["seq"]) == ["model.0.q"]


def test_heads_are_told_by_the_first_or_last_part_of_a_path():
    for path in ("lm_head", "cls.predictions.decoder", "classifier.out", "model.score", "a.logits"):
        assert is_head(path), path
    for path in ("model.lm_head.q", "model.scores", "heads.0", "encoder.q"):
        assert not is_head(path), path


def test_target_errors():
    for arguments, message in [
        ((["qq"],), "'qq' matches no layer"),
        ((["norm"],), "'model.0.norm', which cannot be adapted: it is neither"),
        ((["odd"],), "has a forward of its own"),
        ((r".*\.odd",), "has a forward of its own"),
        (("all-linear", r".*"), "leaves no layer to adapt"),
    ]:
        with pytest.raises(TargetError, match=message):
            select(LAYERS, *arguments)


def test_resized_mean_is_the_nearest_of_its_rank():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(r, 9)), rng.normal(size=(7, r))) for r in (2, 3)]
    mean = (2.0 * pairs[0][1] @ pairs[0][0] + 0.5 * pairs[1][1] @ pairs[1][0]) / 2
    for rank in (1, 3, 5, 6):
        a, b = resized_mean(pairs, [2.0, 0.5], rng.normal(size=(rank, 9)), 1.5, 2)
        assert a.shape == (rank, 9) and b.shape == (7, rank)
        lost = np.linalg.norm(np.linalg.svd(mean)[1][rank:])
        assert np.linalg.norm(1.5 * b @ a - mean) == pytest.approx(lost, abs=1e-9)


def test_layouts_hash_by_value():
    registry = FeatureRegistry({"g": ["a", "b"]})
    config = FlixConfig(registry=registry, ranks=2, rank_pattern={"q": 3})
    assert len({config.layout("x"), config.layout("y"), config.layout("q")}) == 2
