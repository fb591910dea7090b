"""Ranks and scales of a layer."""

from __future__ import annotations

import numpy as np

from flix import FeatureRegistry, FlixConfig
from flix.core.config.layout import LayerLayout

LAYOUT = LayerLayout((1, 3, 0, 2, 2, 4), (1.0,) * 6)


def test_layouts_hash_by_value():
    registry = FeatureRegistry({"g": ["a", "b"]})
    config = FlixConfig(registry=registry, ranks=2, rank_pattern={"q": 3})
    assert len({config.layout("x"), config.layout("y"), config.layout("q")}) == 2


def test_equal_layouts_of_a_configuration_are_one_object():
    registry = FeatureRegistry({"g": ["a", "b"]})
    found = FlixConfig(registry=registry, ranks=2, rank_pattern={"q": 3}).layouts("xqy")
    assert list(found) == ["x", "q", "y"]
    assert found["x"] is found["y"] and found["q"].ranks == (3, 3)


def test_features_stand_in_tables_by_id():
    assert LAYOUT.lengths.tolist() == [1, 3, 0, 2, 2, 4, 0]
    assert LAYOUT.starts.tolist() == [0, 1, 4, 4, 6, 8, 12]
    assert LAYOUT.lengths.dtype == LAYOUT.starts.dtype == np.int32
    assert (LAYOUT.rows, LAYOUT.widest) == (12, 4)
    assert [LAYOUT.most(n) for n in (0, 1, 2, 3, 4, 5, 6, 9, None)] == [
        0,
        4,
        7,
        9,
        11,
        12,
        12,
        12,
        12,
    ]
    assert [LAYOUT.span(i) for i in (1, 2, 5)] == [slice(1, 4), slice(4, 4), slice(8, 12)]


def test_a_layout_without_features_has_no_rows():
    empty = LayerLayout((), ())
    assert (empty.rows, empty.widest, empty.most(3), empty.pairs([], [])) == (0, 0, 0, {})


def test_pairs_are_put_into_tables_and_read_out_of_them():
    a, b = np.zeros((12, 5)), np.zeros((12, 3))
    pairs = {
        i: (np.full((rank, 5), i + 1.0), np.full((3, rank), -i - 1.0))
        for i, rank in enumerate(LAYOUT.ranks)
    }
    LAYOUT.put(a, b, {i: pairs[i] for i in (5, 1, 2)})
    assert a[:, 0].tolist() == [0, 2, 2, 2, 0, 0, 0, 0, 6, 6, 6, 6] == (-b[:, 0]).tolist()
    LAYOUT.put(a, b, pairs)
    found = LAYOUT.pairs(a, b)
    assert list(found) == [0, 1, 3, 4, 5]
    for i, pair in found.items():
        for part, wanted in zip(pair, pairs[i], strict=True):
            np.testing.assert_array_equal(part, wanted)
    assert list(LAYOUT.pairs(a, b, [4, 2, 0])) == [4, 0]
