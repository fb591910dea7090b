"""Whose a row is."""

from __future__ import annotations

import numpy as np
import pytest

from flix import ConfigError, FeatureError, FeatureRegistry, RoutingError
from flix.core.features.owners import owner_parts, per_feature, positive, row_owners

REGISTRY = FeatureRegistry({"task": ["ner"], "tenant": ["ann", "ben", "cyd"]})  # ids 0; 1 to 3


def test_a_row_is_of_the_one_feature_of_the_group_that_it_names():
    ids = np.array([[0, 3], [1, -1], [-1, -1], [3, 3], [0, -1]], np.int32)
    found = row_owners(ids, REGISTRY, "tenant")
    assert (found.ids, found.features) == ((1, 3), (("tenant", "ann"), ("tenant", "cyd")))
    assert found.slots.tolist() == [1, 0, 2, 1, 2]


def test_by_token_too():
    ids = np.array([[[0, -1], [2, -1]], [[1, 0], [1, -1]]], np.int64)
    assert row_owners(ids, REGISTRY, "tenant").slots.tolist() == [1, 0]


@pytest.mark.parametrize("rows", [0, 2])
def test_rows_of_nobody(rows):
    found = row_owners(np.full((rows, 2), -1), REGISTRY, "tenant")
    assert (found.ids, found.slots.tolist()) == ((), [0] * rows)
    assert row_owners(np.ones((2, 1), int), REGISTRY, "tenant").slots.tolist() == [0, 0]
    assert row_owners(np.ones((2, 0), int), REGISTRY, "tenant").slots.tolist() == [0, 0]


def test_a_row_of_two_is_refused():
    ids = np.array([[1, -1], [0, -1], [3, 2]])
    with pytest.raises(
        RoutingError, match="row 2 names tenant=ben and tenant=cyd; a row of tenants"
    ):
        row_owners(ids, REGISTRY, "tenant")
    with pytest.raises(RoutingError, match="row 0 names tenant=ann and tenant=ben"):
        row_owners(np.array([[[1], [2]]]), REGISTRY, "tenant")
    with pytest.raises(FeatureError, match=r"no feature group 'tenants' \(did you mean 'tenant'"):
        row_owners(ids, REGISTRY, "tenants")
    with pytest.raises(RoutingError, match="must hold integer ids"):
        row_owners(ids.astype(float), REGISTRY, "tenant")


@pytest.mark.parametrize(
    "rows, wanted",
    [
        (3, [[0, 2], [1, 4, 5, 6], [3, 7, 8]]),  # ben has four, and a part of his own
        (4, [[0, 2], [1, 4, 5, 6], [3, 7, 8]]),
        (6, [[0, 1, 2, 4, 5, 6], [3, 7, 8]]),
        (9, [[0, 1, 2, 3, 4, 5, 6, 7, 8]]),
    ],
)
def test_parts_have_all_rows_of_their_owners(rows, wanted):
    owners = row_owners(np.array([1, 2, 1, 3, 2, 2, 2, -1, -1])[:, None], REGISTRY, "tenant")
    assert [part.tolist() for part in owner_parts(owners, rows)] == wanted


def test_parts_of_nothing_and_of_nobodys_rows():
    nobody = row_owners(np.full((3, 1), -1), REGISTRY, "tenant")
    assert [part.tolist() for part in owner_parts(nobody, 2)] == [[0, 1], [2]]
    assert owner_parts(row_owners(np.zeros((0, 1), int), REGISTRY, "tenant"), 2) == []
    for wrong in (0, True, 1.5):
        with pytest.raises(ConfigError, match="rows must be"):
            owner_parts(nobody, wrong)


def test_a_setting_by_feature_or_group_or_one_for_all():
    def found(given):
        return per_feature("norms", given, REGISTRY, positive)

    everyone = dict.fromkeys(REGISTRY.features, 2.0)
    assert found(2) == everyone
    assert found({"task": 1, "tenant": np.float32(2)}) == {**everyone, ("task", "ner"): 1.0}
    # Features win over groups, in whatever order they stand.
    for given in (
        {"tenant": 2, ("tenant", "ben"): 3},
        {("tenant", "ben"): 3, "tenant": 2},
    ):
        assert found(given) == {("tenant", "ann"): 2, ("tenant", "ben"): 3, ("tenant", "cyd"): 2}
    assert found({"task": 1, ("task", "ner"): 4}) == {("task", "ner"): 4}
    gone = REGISTRY.without_feature("tenant", "ben")
    assert set(per_feature("norms", 2, gone, positive)) == set(gone.live)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"tenants": 1}, FeatureError, r"no feature group 'tenants' \(did you mean 'tenant'"),
        ({("tenant", "bem"): 1}, FeatureError, r"no feature 'bem' \(did you mean 'ben'"),
        ({5: 1}, ConfigError, r"norms names features as \(group, name\), or groups, got 5"),
        ({("a", "b", "c"): 1}, ConfigError, r"or groups, got \('a', 'b', 'c'\)"),
        ({"tenant": 0}, ConfigError, "norms of 'tenant' must be a positive number, got 0"),
        ({("task", "ner"): True}, ConfigError, r"norms of \('task', 'ner'\) must be .* got True"),
        (-1, ConfigError, "^norms must be a positive number, got -1"),
        (float("nan"), ConfigError, "norms must be a positive number, got nan"),
        ("1", ConfigError, "norms must be a positive number, got '1'"),
    ],
)
def test_settings_by_feature_that_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        per_feature("norms", given, REGISTRY, positive)


def test_a_setting_that_is_given_twice_is_refused():
    """Of two Unicode forms of one name, neither is left out without a word."""
    registry = FeatureRegistry({"t\u00e9": ["\u00e9", "x"]})
    for one, two in (("t\u00e9", "te\u0301"), (("t\u00e9", "\u00e9"), ("te\u0301", "e\u0301"))):
        with pytest.raises(ConfigError, match=r"norms is given twice for .*, in two Unicode forms"):
            per_feature("norms", {one: 1, two: 2}, registry, positive)
        assert per_feature("norms", {two: 2}, registry, positive)["t\u00e9", "\u00e9"] == 2


def test_an_infinite_norm_asks_for_the_norm_alone():
    assert positive(float("inf"), "max_norm") == float("inf")
