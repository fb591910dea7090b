"""Weights of a new combination, found from losses."""

from __future__ import annotations

import numpy as np
import pytest

import flix
from flix import ConfigError, FeatureError, FeatureRegistry, FlixError
from flix.core.features.search import LARGEST, SearchSpace, descended, evolved, search_weights

REGISTRY = FeatureRegistry(
    {"language": ["hau", "swa", "yor"], "family": ["bantu", "none"], "task": ["ner", "pos"]},
    implies={("language", "swa"): [("family", "bantu")]},
)
ROW = {"task": "ner"}
BEST = {("language", "hau"): 0.7, ("language", "swa"): -0.4, ("task", "ner"): 1.2}


def bowl(space):
    """A loss that is least, 1, at BEST, and its gradient."""
    goal = np.array([BEST.get(f, 0.0) for f in space.features])

    def loss(weights):
        return 1 + float(np.sum((weights - goal) ** 2)), 2 * (weights - goal)

    return loss


def test_the_space_holds_what_is_tried_and_what_stays():
    space = SearchSpace(REGISTRY, ROW, ["language"])
    assert dict(zip(space.features, zip(space.start, space.free, strict=True), strict=True)) == {
        ("task", "ner"): (1.0, False),
        ("language", "hau"): (0.0, True),
        ("language", "swa"): (0.0, True),
        ("language", "yor"): (0.0, True),
    }
    everything = SearchSpace(REGISTRY, {"language": "swa", "task": {"ner": 0.5}})
    assert set(everything.features) == set(REGISTRY.features) and everything.free.all()
    started = dict(zip(everything.features, everything.start, strict=True))
    assert started["language", "swa"] == started["family", "bantu"] == 1.0
    assert started["task", "ner"] == 0.5 and started["task", "pos"] == 0.0


def test_removed_features_are_not_tried():
    space = SearchSpace(REGISTRY.without_feature("language", "yor"), ROW, ["language"])
    assert ("language", "yor") not in space.features


def test_a_language_without_a_feature_starts_from_the_rest():
    space = SearchSpace(REGISTRY, {"language": "xho", "task": "ner"}, ["language"], unknown="skip")
    assert space.start.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_routings_are_of_one_composition():
    space = SearchSpace(REGISTRY, ROW, ["language"])
    routing = space.routing(np.array([1.0, 0.5, 0.0, 2.0]), 3)
    assert routing.ids.shape == routing.weights.shape == (3, 4)
    assert routing.names(2) == {
        ("task", "ner"): 1.0,
        ("language", "hau"): 0.5,
        ("language", "swa"): 0.0,
        ("language", "yor"): 2.0,
    }


def test_rows_mean_what_was_searched():
    """What a feature brings along is named, so that encoding the row gives the searched weights and no more."""
    space = SearchSpace(REGISTRY, ROW, ["language", "task"])
    weights = np.array(
        [{("language", "swa"): 0.5, ("task", "ner"): 1.0}.get(f, 0.0) for f in space.features]
    )
    row = space.row(weights)
    assert row == {"language": {"swa": 0.5}, "task": {"ner": 1.0}, "family": {"bantu": 0.0}}
    names = REGISTRY.encode([row]).names(0)
    assert {f: w for f, w in names.items() if w} == {("language", "swa"): 0.5, ("task", "ner"): 1.0}


def _evolved(space, **settings):
    loss = bowl(space)
    return evolved(lambda w: loss(w)[0], space, steps=80, **settings)


def _descended(space, **settings):
    return descended(bowl(space), space, steps=80, **settings)


@pytest.mark.parametrize("search", [_evolved, _descended])
def test_both_find_the_least_loss(search):
    space = SearchSpace(REGISTRY, ROW, ["language"])
    found = search(space, l1=0.0)
    assert found.before == pytest.approx(1 + 0.7**2 + 0.4**2 + 0.2**2)
    assert found.loss == pytest.approx(1 + 0.2**2, abs=1e-2)  # the task's weight stays
    assert found.row["language"]["hau"] == pytest.approx(0.7, abs=0.1)
    assert found.row["task"] == {"ner": 1.0}
    assert list(found.history) == sorted(found.history, reverse=True) and len(found.history) == 80


@pytest.mark.parametrize("search", [_evolved, _descended])
def test_the_penalty_keeps_weights_small(search):
    space = SearchSpace(REGISTRY, ROW, ["language"])
    loose, tight = (search(space, l1=l1).row.get("language", {}) for l1 in (0.0, 6.0))
    assert sum(map(abs, tight.values())) < 0.2 < sum(map(abs, loose.values()))


@pytest.mark.parametrize("search", [_evolved, _descended])
def test_nothing_is_worse_than_the_row_given(search):
    space = SearchSpace(REGISTRY, {"language": {"hau": 0.7, "swa": -0.4}, "task": {"ner": 1.2}})
    found = search(space)
    assert found.loss <= found.before


def test_weights_stay_within_bounds_and_draws_follow_the_seed():
    space = SearchSpace(REGISTRY, ROW)
    asked = []

    def loss(weights):
        asked.append(weights)
        return float(-weights.sum())

    first = evolved(loss, space, steps=10, seed=1)
    assert np.abs(asked).max() <= LARGEST
    assert evolved(loss, space, steps=10, seed=1) == first
    assert evolved(loss, space, steps=10, seed=2) != first


def test_losses_that_are_not_finite_are_passed_over():
    space = SearchSpace(REGISTRY, ROW, ["language"])
    loss = bowl(space)
    found = evolved(lambda w: np.nan if w[1] > 0.2 else loss(w)[0], space, steps=60, l1=0.0)
    assert np.isfinite(found.loss) and found.row["language"]["hau"] <= 0.2
    with pytest.raises(ConfigError, match="the row that the search starts from"):
        evolved(lambda w: np.nan, space)


def test_any_frameworks_loss():
    def loss(row):
        return (row.get("language", {}).get("hau", 0.0) - 0.7) ** 2

    found = search_weights(loss, REGISTRY, ROW, groups=["language"], steps=60, l1=0.0)
    assert found.row["language"]["hau"] == pytest.approx(0.7, abs=0.05)
    assert flix.search_weights is search_weights


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"groups": "language"}, ConfigError, r"write \['language'\]"),
        ({"groups": ["langage"]}, FeatureError, "langage"),
        ({"groups": []}, FeatureError, "nothing to search"),
        ({"steps": 0}, ConfigError, "steps"),
        ({"l1": -1.0}, ConfigError, "l1 must not be negative"),
        ({"l1": float("nan")}, ConfigError, "l1"),
        ({"row": {"language": "xho"}}, FeatureError, "xho"),
    ],
)
def test_mistakes_are_named(changes, error, message):
    settings = {"row": ROW, **changes}
    with pytest.raises(error, match=message) as told:
        search_weights(lambda row: 0.0, REGISTRY, **settings)
    assert isinstance(told.value, FlixError)
