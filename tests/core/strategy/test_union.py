"""How a batch's routing falls onto a layer's ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flix.core.config.layout import LayerLayout
from flix.core.strategy.union import bank_part, bank_rows, first_unlike, plan_union


@settings(max_examples=150, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    data=st.data(),
    rows=st.integers(0, 5),
    width=st.integers(1, 4),
)
def test_a_union_plan_rebuilds_the_sum(ranks, data, rows, width):
    """What the plan says equals Σ over slots of s_f B_f A_f, for every row."""
    ids = data.draw(
        st.lists(
            st.lists(st.integers(-1, len(ranks) - 1), min_size=width, max_size=width),
            min_size=rows,
            max_size=rows,
        )
    )
    ids = np.asarray(ids, dtype=np.int64).reshape(rows, width)
    scales = tuple(0.5 + i for i in range(len(ranks)))
    plan = plan_union(ids, LayerLayout(tuple(ranks), scales))
    present = {i for i in ids.ravel().tolist() if i >= 0 and ranks[i] > 0}
    assert plan.active == tuple(sorted(present))
    owner = [(f, j) for f in plan.active for j in range(ranks[f])]
    assert plan.union == len(owner)
    for n in range(rows):
        expected: dict = {}
        for slot, f in enumerate(ids[n].tolist()):
            for j in range(ranks[f] if f >= 0 else 0):
                expected.setdefault((f, j), []).append((scales[f], slot))
        found: dict = {}
        for r in range(plan.width):
            if plan.scales[n, r]:
                found.setdefault(owner[plan.rows[n, r]], []).append(
                    (plan.scales[n, r], plan.slots[n, r])
                )
        assert found == expected


def test_touched_features_join_the_union():
    plan = plan_union(np.array([[0]]), LayerLayout((1, 2, 3), (1.0, 1.0, 1.0)), touched=(2,))
    assert plan.active == (0, 2) and plan.union == 4 and plan.rows.tolist() == [[0]]


def test_the_first_row_that_differs():
    assert first_unlike(np.array([[1, 2], [1, 2]]), None) is None
    assert first_unlike(np.array([[1], [1], [2]]), None) == (2,)
    assert first_unlike(np.array([[1], [1]]), np.array([[1.0], [0.5]])) == (1,)
    tokens = np.zeros((2, 3, 1), np.int32)
    tokens[1, 2] = 4
    assert first_unlike(tokens, None) == (1, 2)


def test_slots_are_grouped_by_union_row():
    plan = plan_union(np.array([[2, -1, 0], [0, 0, 1]]), LayerLayout((2, 0, 1), (1.0, 3.0, 0.5)))
    rows, order, starts = plan.grouped()
    assert {array.dtype for array in (rows, order, starts)} == {np.dtype(np.int32)}
    assert rows.tolist() == [[2, 0, 1, -1], [0, 1, 0, 1]]
    assert [order[starts[u] : starts[u + 1]].tolist() for u in range(3)] == [
        [1, 4, 6],
        [2, 5, 7],
        [0],
    ]


def test_rows_of_a_bank():
    first, ranks, slots = bank_rows((2, 0, 3))
    assert first.tolist() == [0, 0, 2, 2, 2]
    assert ranks.tolist() == [2, 2, 3, 3, 3]
    assert slots.tolist() == [0, 1, 0, 1, 2]


def test_the_part_of_a_bank_that_rows_use():
    ranks = (2, 3, 1, 4)  # begin at 0, 2, 5 and 6
    part = bank_part(np.array([[6, 7, 8, -1, -1], [5, -1, -1, -1, -1]], np.int32), ranks)
    assert part.features.tolist() == [2, 3]
    assert part.rows.tolist() == [[1, 2, 3], [0, 5, 5]]  # unused slots read the row after the last
    assert part.own.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_rows_that_use_nothing_of_a_bank(shape):
    part = bank_part(np.full(shape, -1, np.int32), (2, 3))
    assert part.features.tolist() == part.own.tolist() == []
    assert part.rows.shape == (shape[0], 0)
