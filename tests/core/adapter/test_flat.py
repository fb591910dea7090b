"""Where pairs lie in a feature's vector: every value has one place, and layers that join later come last."""

import numpy as np
import pytest

import flix
from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.flat import flat_layout

REGISTRY = flix.FeatureRegistry({"language": ["hau", "swa", "yor"], "task": ["ner"]})
SHAPES = {"a": LayerShape(3, 5), "b": LayerShape(4, 4), "c": LayerShape(7, 2, "embedding")}


def config(**changes):
    ranks = {"language": {"hau": 1, "swa": 2, "yor": 0}, "task": 2}
    settings = {"registry": REGISTRY, "ranks": ranks, "rank_pattern": {"b": {"task": {"ner": 0}}}}
    return flix.FlixConfig(**{**settings, **changes})


def test_a_vector_holds_every_value_once_in_rows():
    layout = flat_layout(config(), SHAPES)
    for i, feature in enumerate(REGISTRY.features):
        ranks = [config().rank(path, feature) for path in SHAPES]
        assert layout.length(i) == sum(
            r * (s.d_in + s.d_out) for r, s in zip(ranks, SHAPES.values(), strict=True)
        )
        vector = np.arange(layout.length(i), dtype=np.float32)
        pairs = layout.pairs(vector, i)
        assert list(pairs) == [path for path, r in zip(SHAPES, ranks, strict=True) if r]
        # Layer after layer, A and then B transposed, both row by row.
        found = [side.ravel() for a, b in pairs.values() for side in (a, b.T)]
        assert np.array_equal(np.concatenate(found or [vector]), vector)
        for path, (a, b) in pairs.items():
            assert a.shape == (config().rank(path, feature), SHAPES[path].d_in)
            assert b.shape == (SHAPES[path].d_out, config().rank(path, feature))
            assert np.shares_memory(a, vector) and np.shares_memory(b, vector)


def test_sizes_and_starts_agree_with_the_views():
    layout = flat_layout(config(), SHAPES)
    swa, ner = REGISTRY.id("language", "swa"), REGISTRY.id("task", "ner")
    assert layout.sizes[swa] == (6, 10, 8, 8, 14, 4)
    assert layout.sizes[ner] == (6, 10, 0, 0, 14, 4)
    assert layout.starts[ner] == (0, 6, 16, 16, 16, 30, 34)
    assert layout.length(REGISTRY.id("language", "yor")) == 0
    assert layout.rank(ner, layout.places["b"]) == 0


def test_what_is_put_is_found():
    layout, rng = flat_layout(config(), SHAPES), np.random.default_rng(0)
    ner = REGISTRY.id("task", "ner")
    vector = np.zeros(layout.length(ner), np.float32)
    wanted = {}
    for path in ("c", "a"):
        shape = SHAPES[path]
        wanted[path] = rng.normal(size=(2, shape.d_in)), rng.normal(size=(shape.d_out, 2))
        layout.put(vector, ner, path, wanted[path])
    for path, pair in layout.pairs(vector, ner).items():
        for found, value in zip(pair, wanted[path], strict=True):
            np.testing.assert_array_equal(found, value.astype(np.float32))
    with pytest.raises(ValueError, match="broadcast"):
        layout.put(vector, ner, "a", (np.zeros((2, 4)), np.zeros((5, 2))))


def test_layers_that_join_leave_vectors_without_ranks_in_them_as_they_are():
    fewer = {path: SHAPES[path] for path in ("a", "b")}
    before = flat_layout(config(), fewer)
    grown = config(rank_pattern={"c": {"language": 0}})
    after = flat_layout(grown, SHAPES)
    swa = REGISTRY.id("language", "swa")
    assert after.starts[swa][:5] == before.starts[swa] and after.length(swa) == before.length(swa)
    ner = REGISTRY.id("task", "ner")
    assert after.length(ner) > before.length(ner)


def test_layers_of_equal_ranks_share_one_layout():
    layout = flat_layout(config(), SHAPES)
    assert layout.layouts[0] is layout.layouts[2] and layout.layouts[0] != layout.layouts[1]
    equal = flat_layout(config(ranks=2, rank_pattern={}), SHAPES).sizes
    assert all(sizes is equal[0] for sizes in equal)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chosen_features_are_packed_layer_by_layer(dtype):
    layout, swa = flat_layout(config(), SHAPES), REGISTRY.id("language", "swa")
    ids = {feature: i for i, feature in enumerate(REGISTRY.features)}
    vector = np.arange(layout.length(swa), dtype=dtype)
    hau = np.zeros(layout.length(ids["language", "hau"]))
    pairs = {
        path: {("language", "swa"): pair, ("language", "hau"): layout.views(hau, 0, place)}
        for place, (path, pair) in enumerate(layout.pairs(vector, swa).items())
    }
    found = layout.packed(ids, pairs.items(), [("language", "swa"), ("language", "yor")], dtype)
    assert list(found) == [swa] and found[swa].dtype == dtype
    assert np.array_equal(found[swa], vector)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_addresses_are_those_of_the_rows_of_the_views(dtype):
    layout = flat_layout(config(), SHAPES)
    features = [REGISTRY.id("language", "swa"), REGISTRY.id("task", "ner")]
    vectors = [np.zeros(layout.length(i), dtype) for i in features]
    at, size = [v.ctypes.data for v in vectors], np.dtype(dtype).itemsize
    places = [
        layout.places["a"],
        layout.places["c"],
    ]  # of one layout: swa and ner have rank 2 in both
    found = layout.addresses(places, features, at, np.asarray([0, 1, 0, 1]), size)
    assert found.shape == (2, 2, 4) and found.dtype == np.int64
    for place, sides in zip(places, found, strict=True):
        views = [layout.views(v, i, place) for v, i in zip(vectors, features, strict=True)]
        expected = [[row.ctypes.data for a, _ in views for row in a], [row.ctypes.data for _, b in views for row in b.T]]  # fmt: skip
        assert sides.tolist() == expected
