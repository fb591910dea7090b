"""What a collator decides: widths, and dropout of rows that carry their numbers."""

from __future__ import annotations

import numpy as np
import pytest

import flix
from flix.core.sampling.batching import drop_numbered, implied_groups, usual_width, width_for


def registry() -> flix.FeatureRegistry:
    return flix.FeatureRegistry(
        {
            "language": ["hau", "fra", "por"],
            "family": ["chadic", "romance"],
            "task": ["ner", "pos"],
            "shared": ["all"],
        },
        implies={
            ("language", "hau"): [("family", "chadic")],
            ("language", "fra"): [("family", "romance")],
            ("task", "*"): [("shared", "all")],
        },
    )


def test_usual_width_is_that_of_the_fullest_row() -> None:
    known = registry()
    assert usual_width(known, ["language"]) == 2
    assert usual_width(known, ["language", "task"]) == 4
    # A row may name another family than its language implies.
    assert usual_width(known) == 5
    assert usual_width(flix.FeatureRegistry({"task": ["ner"]})) == 1
    rows = [
        {"language": a, "family": b, "task": c, "shared": "all"}
        for a in known.names("language")
        for b in known.names("family")
        for c in known.names("task")
    ]
    assert known.encode(rows).width == 5


def test_usual_width_of_very_many_combinations_is_a_bound() -> None:
    groups = {f"g{i}": [f"x{j}" for j in range(10)] for i in range(6)}
    implies = {(f"g{i}", f"x{j}"): [("all", f"y{j}")] for i in range(6) for j in range(10)}
    known = flix.FeatureRegistry({**groups, "all": [f"y{j}" for j in range(10)]}, implies)
    assert 12 <= usual_width(known) <= 13


def test_width_for_takes_few_values() -> None:
    assert [width_for(n, 3) for n in (1, 3, 4, 6, 7)] == [3, 3, 6, 6, 9]


def test_implied_groups() -> None:
    assert implied_groups(registry()) == ("family", "shared")


def test_drop_numbered_is_dropout_of_the_step() -> None:
    known = flix.FeatureRegistry({"language": [f"l{i}" for i in range(20)], "task": ["ner", "pos"]})
    rows = [{"language": f"l{i}", "task": "ner"} for i in range(12)]
    routing = known.encode(rows)
    dropout = flix.FeatureDropout(p=0.5)
    whole = dropout(routing, seed=1, step=4)
    # As the parts of one step, in any order and grouping.
    parts = [drop_numbered(dropout, routing[s], [(4, i) for i in range(12)[s]], seed=1) for s in (slice(0, 5), slice(5, 12))]  # fmt: skip
    assert np.array_equal(np.concatenate([p.ids for p in parts]), whole.ids)
    order = [7, 2, 3, 11, 0]
    mixed = drop_numbered(dropout, routing[order], [(4, i) for i in order], seed=1)
    assert np.array_equal(mixed.ids, whole.ids[order])
    assert np.array_equal(mixed.weights, whole.weights[order])
    # Rows of several steps in one batch.
    two = drop_numbered(dropout, routing[[0, 1]], [(4, 0), (5, 1)], seed=1)
    assert np.array_equal(two.ids[1], dropout(routing, seed=1, step=5).ids[1])
    with pytest.raises(ValueError, match="2 rows need as many numbers"):
        drop_numbered(dropout, routing[[0, 1]], [(4, 0)], seed=1)
