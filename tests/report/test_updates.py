"""What features share: pairs, orders, and what is left out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flix import Adapter
from flix.core.adapter.similarity import cosines, inner_products
from flix.report import updates
from flix.report.updates import clustered, compare
from tests.helpers.runs import similar_adapter


def test_the_most_similar_pair_of_each_group_is_found() -> None:
    found = compare(similar_adapter(["hau", "swa", "yor", "zul"], ["ner", "pos"]))
    assert {found.alike["language"].one, found.alike["language"].other} == {"hau", "swa"}
    assert found.alike["language"].cosine > 0.9 > found.least["language"].cosine
    assert found.alike["task"] == found.least["task"]
    assert found.untrained == () and len(found.totals) == 6
    groups = [matrix.groups for matrix in found.matrices]
    assert groups == [("language", "language"), ("task", "task"), ("language", "task")]


def test_matrices_hold_the_cosines_in_their_own_order() -> None:
    adapter = similar_adapter(["hau", "swa", "yor"], ["ner", "pos"])
    found = compare(adapter)
    features = adapter.config.registry.live
    for layer, path in enumerate(found.layers):
        whole = cosines(inner_products(adapter, path, features))
        for matrix in found.matrices:
            at = [[features.index((g, n)) for n in names] for g, names in zip(matrix.groups, (matrix.rows, matrix.columns), strict=True)]  # fmt: skip
            np.testing.assert_allclose(matrix.by_layer[layer], whole[np.ix_(*at)], atol=1e-12)
    total = sum(inner_products(adapter, path, features) for path in found.layers)
    assert [found.totals[f] for f in features] == pytest.approx(np.sqrt(np.diagonal(total)))


def test_like_stands_beside_like() -> None:
    rng = np.random.default_rng(0)
    family = rng.permutation([0, 0, 0, 1, 1, 1, 2, 2, 2])
    similarity = np.where(family[:, None] == family, 0.8, 0.1) + rng.normal(0, 0.01, (9, 9))
    order = clustered((similarity + similarity.T) / 2)
    assert sorted(order) == list(range(9))
    assert sum(family[a] != family[b] for a, b in itertools.pairwise(order)) == 2
    assert clustered(np.zeros((0, 0))) == [] and clustered(np.ones((1, 1))) == [0]
    assert sorted(clustered(np.full((3, 3), np.nan))) == [0, 1, 2]


def test_features_without_an_update_are_named_and_have_no_cosine() -> None:
    adapter = similar_adapter(["hau", "swa", "yor"], [])
    for name in adapter.tensors:
        if name.endswith("B.language.yor"):
            adapter.tensors[name][:] = 0.0
    found = compare(adapter)
    assert found.untrained == (("language", "yor"),)
    matrix = found.matrices[0]
    row = matrix.rows.index("yor")
    assert np.isnan(matrix.overall[row]).all() and np.isnan(matrix.by_layer[:, row]).all()


def test_nothing_trained_has_no_pair() -> None:
    adapter = similar_adapter(["hau", "swa"], [])
    still = Adapter(
        adapter.config, adapter.layers, {name: 0 * t for name, t in adapter.tensors.items()}
    )
    assert compare(still).alike == {}


def test_the_smallest_updates_are_left_out_of_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(updates, "MOST", 3)
    adapter = similar_adapter([f"l{i}" for i in range(7)], ["ner", "pos"])
    found = compare(adapter)
    largest = sorted(found.totals, key=lambda f: -found.totals[f] if f[0] == "language" else 0)[:3]
    assert set(found.matrices[0].rows) == {name for _, name in largest}
    assert found.matrices[0].left_out == 4 and found.matrices[-1].left_out == 4
