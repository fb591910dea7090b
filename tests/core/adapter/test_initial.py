"""Initial values: keyed, pinned, of the right size."""

from __future__ import annotations

import numpy as np
import pytest

from flix.core.adapter import initial
from flix.core.adapter.initial import dropout_seed, initial_a, initial_b, initial_pairs, orthonormal


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


@pytest.mark.parametrize("values", [1, 100, 1 << 30])
def test_a_value_goes_by_its_position_however_many_are_made_at_a_time(monkeypatch, values):
    arguments = {"seed": 0, "layer": "a.q", "group": "task", "feature": "ner", "rank": 3}
    for d_in in (40, initial._VALUES + 3):
        wanted = initial_a(d_in=d_in, **arguments)
        assert len({row.tobytes() for row in wanted}) == 3
        with monkeypatch.context() as patch:
            patch.setattr(initial, "_VALUES", values)
            np.testing.assert_array_equal(initial_a(d_in=d_in, **arguments), wanted)


def test_orthogonal_rows_are_gram_and_schmidts():
    arguments = {"seed": 0, "layer": "a.q", "group": "task", "feature": "ner", "d_in": 12}
    plain = initial_a(rank=8, **arguments)
    a = orthonormal(plain)
    assert a.dtype == np.float32
    np.testing.assert_allclose(a @ a.T, np.eye(8), atol=1e-6)
    wanted = []
    for row in plain.astype(np.float64):
        rest = row - sum(((q @ row) * q for q in wanted), np.zeros(12))
        wanted.append(rest / np.linalg.norm(rest))
    np.testing.assert_allclose(a, wanted, atol=1e-6)
    np.testing.assert_allclose(orthonormal(initial_a(rank=3, **arguments)), a[:3], atol=1e-7)


def test_more_rows_than_inputs_begin_anew():
    a = orthonormal(initial_a(seed=0, layer="q", group="g", feature="f", rank=7, d_in=3))
    for part in (a[:3], a[3:6]):
        np.testing.assert_allclose(part @ part.T, np.eye(3), atol=1e-6)
    assert a.shape == (7, 3) and np.linalg.norm(a[6]) == pytest.approx(1)
    assert orthonormal(np.zeros((0, 3), np.float32)).shape == (0, 3)
    one = orthonormal(initial_a(seed=0, layer="q", group="g", feature="f", rank=5, d_in=1))
    np.testing.assert_array_equal(np.abs(one), 1)


def test_pairs_start_orthogonal_where_asked_each_by_itself():
    ranks, sizes = {("g", "a"): 2, ("g", "b"): 3, ("g", "c"): 0}, {"d_in": 6, "d_out": 4}
    found = initial_pairs(seed=1, layer="q", ranks=ranks, init="orthogonal", **sizes)
    alone = initial_pairs(seed=1, layer="q", ranks={("g", "b"): 3}, init="orthogonal", **sizes)
    assert {*found} == {("g", "a"), ("g", "b")} and not any(b.any() for _, b in found.values())
    np.testing.assert_array_equal(found["g", "b"][0], alone["g", "b"][0])
    experts = initial_pairs(seed=1, layer="q", ranks=ranks, init="orthogonal", experts=2, **sizes)
    for e in range(2):
        own = initial_pairs(seed=1, layer=f"q.{e}", ranks=ranks, init="orthogonal", **sizes)
        np.testing.assert_array_equal(experts["g", "a"][0][e], own["g", "a"][0])


def test_a_layers_own_generator_of_masks_begins_where_seed_and_layer_say():
    seeds = {dropout_seed(seed, layer) for seed in range(20) for layer in ("a.q", "a.k")}
    assert len(seeds) == 40 and all(0 <= seed < 1 << 31 for seed in seeds)
    assert dropout_seed(0, "a.q") == PINNED_SEED


PINNED_SEED = 816125863
