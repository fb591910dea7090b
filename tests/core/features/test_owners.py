"""Whose a row is."""

from __future__ import annotations

import numpy as np
import pytest

from flix import ConfigError, FeatureError, FeatureRegistry, RoutingError
from flix.core.features.owners import owner_parts, row_owners

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
