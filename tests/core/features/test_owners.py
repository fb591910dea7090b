"""Whose a row is."""

from __future__ import annotations

import numpy as np
import pytest

from flix import FeatureError, FeatureRegistry, RoutingError
from flix.core.features.owners import row_owners

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
