"""Schedules: probabilities, and plans of epochs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flix.core.features.cells import (
    MixtureError,
)
from flix.core.sampling.schedule import Schedule, apportion, epoch_rows, probabilities, shares, walk

sizes_of_cells = st.lists(st.integers(1, 40), min_size=1, max_size=8)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 5.0, math.inf])


def test_probabilities_follow_temperature_and_cap():
    assert probabilities([100, 400], 1.0) == pytest.approx([0.2, 0.8])
    assert probabilities([100, 400], 2.0) == pytest.approx([1 / 3, 2 / 3])
    assert probabilities([100, 400], 0.5) == pytest.approx([1 / 17, 16 / 17])
    assert probabilities([100, 400], math.inf) == pytest.approx([0.5, 0.5])
    assert probabilities([100, 400, 9], 1.0, [math.inf, 300, 300]) == pytest.approx(
        np.array([100, 300, 9]) / 409
    )
    # A small temperature overflows nothing.
    assert probabilities([10**9, 2 * 10**9], 0.01) == pytest.approx([2.0**-100, 1.0])


def test_shares_are_the_quickstarts_formula_to_the_bit():
    rng = np.random.default_rng(0)
    for exponent in (0.5, 1.0, 0.0, 0.3):
        for _ in range(50):
            counts = rng.integers(0, 5000, rng.integers(1, 100)).astype(np.float64)
            counts[0] += 1
            weights = np.where(counts > 0, counts**exponent, 0.0)
            assert np.array_equal(shares(counts, exponent), weights / weights.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one cell"),
        (([3, 0],), "cell 1 is empty"),
        (([3, 0], 1.0, None, ["a", "task=b"]), "cell 'task=b' is empty"),
        (([0.5],), "whole numbers of rows"),
        (([3], 0), "temperature must be a number above 0, got 0"),
        (([3], -1.0), "above 0"),
        (([3], math.nan), "above 0"),
        (([3], True), "above 0"),
        (([3], 1.0, [0.5]), "a cap must be 1 or more, got 0.5"),
        (([3], 1.0, [math.nan]), "a cap must be 1 or more"),
        (([3], 1.0, [1, 2]), "1 cells and 2 caps"),
    ],
)
def test_probability_errors(arguments, message):
    with pytest.raises(MixtureError, match=message):
        probabilities(*arguments)


def test_apportionment_is_by_largest_remainder():
    assert apportion(np.array([2.5, 1.3, 0.2]), 4).tolist() == [3, 1, 0]
    assert apportion(np.array([1.4, 1.3, 0.3]), 3).tolist() == [2, 1, 0]
    assert apportion(np.array([0.5, 0.5]), 1).tolist() == [1, 0]
    # Two cells are ahead and cannot give back: of the others, the one with less of a claim waits.
    assert apportion(np.array([-0.5, -0.5, 1.1, 0.9 + 1e-12]), 1).tolist() == [0, 0, 1, 0]
    assert apportion(np.array([-0.6, -0.6, 1.1, 1.1]), 1).tolist() == [0, 0, 0, 1]
    assert apportion(np.array([-0.9, -0.9, -0.9, 4.7]), 2).tolist() == [0, 0, 0, 2]


@settings(max_examples=60, deadline=None)
@given(sizes_of_cells, temperatures, st.integers(1, 50), st.integers(0, 3))
def test_counts_keep_to_the_probabilities(sizes, temperature, length, seed):
    p = probabilities(sizes, temperature)
    schedule = Schedule(sizes, p, length=length, seed=seed)
    total = np.zeros(len(sizes))
    for epoch in range(12):
        counts = schedule.counts(epoch)
        assert counts.sum() == length and (counts >= 0).all()
        assert np.array_equal(schedule.taken(epoch), total)
        total += counts
        assert np.abs(total - p * length * (epoch + 1)).max() < 2
    quota = p * length
    assert np.abs(schedule.counts(0) - quota).max() < 1


@settings(max_examples=60, deadline=None)
@given(sizes_of_cells, temperatures, st.integers(1, 60), st.integers(0, 3))
def test_all_rows_of_a_cell_are_seen_before_any_is_seen_again(sizes, temperature, length, seed):
    schedule = Schedule(sizes, probabilities(sizes, temperature), length=length, seed=seed)
    starts = np.cumsum(sizes) - np.asarray(sizes)
    seen = np.zeros(sum(sizes), np.int64)
    for epoch in range(6):
        drawn = schedule.rows(epoch)
        assert drawn.shape == (length,)
        seen += np.bincount(drawn, minlength=len(seen))
        per_cell = schedule.taken(epoch + 1)
        for start, size, taken in zip(starts, sizes, per_cell.tolist(), strict=True):
            own = seen[start : start + size]
            assert own.sum() == taken
            assert own.max() - own.min() <= 1


def test_an_epoch_is_a_function_of_seed_and_number():
    sizes, names = [50, 20, 5], ["a", "b", "c"]
    schedule = Schedule(sizes, probabilities(sizes, 2.0), length=40, seed=7)
    first = [schedule.rows(epoch) for epoch in range(6)]
    assert np.array_equal(schedule.rows(2), first[2])  # backwards
    fresh = epoch_rows(sizes, length=40, epoch=5, seed=7, temperature=2.0)
    assert np.array_equal(fresh, first[5])
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(epoch_rows(sizes, length=40, seed=8, temperature=2.0), first[0])
    # The order is shuffled through the cells, not one cell after the other.
    cells = np.searchsorted([50, 70], first[0], side="right")
    assert (np.diff(cells) != 0).sum() > 10
    # Any stretch of the endless run, in any order of asking.
    whole = np.concatenate(first)
    assert np.array_equal(schedule.draw(range(240)), whole)
    assert np.array_equal(schedule.draw([239, 3, 100]), whole[[239, 3, 100]])
    # Named cells walk alike whatever other cells there are.
    alone = Schedule([20], [1.0], length=10, seed=7, names=["b"]).rows(0)
    beside = Schedule([50, 20], [0.5, 0.5], length=20, seed=7, names=names[:2]).rows(0)
    assert sorted(alone) == sorted(row - 50 for row in beside if row >= 50)


def test_epochs_stay_as_they_are():
    """A run that is resumed with a later version sees the rows it would have seen."""
    drawn = epoch_rows([6, 3, 1], length=8, epoch=3, seed=1, temperature=2.0, names=["a", "b", "c"])
    assert drawn.tolist() == [1, 4, 9, 8, 8, 6, 0, 0]


def test_a_walk_goes_through_permutations():
    words = (np.uint64(1), np.uint64(2))
    steps = walk(5, 0, 23, words)
    for start in range(0, 20, 5):
        assert sorted(steps[start : start + 5].tolist()) == list(range(5))
    assert len({tuple(steps[start : start + 5]) for start in range(0, 20, 5)}) > 1
    assert np.array_equal(walk(5, 7, 9, words), steps[7:16])
    assert walk(5, 3, 0, words).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "an epoch's length must be a whole number of 1 or more, got 0"),
        ({"length": 2.5}, "whole number"),
        ({"probabilities": [0.5, 0.6]}, "sum to 1"),
        ({"probabilities": [1.5, -0.5]}, "0 or more"),
        ({"probabilities": [1.0]}, "2 cells and 1 probabilities"),
        ({"sizes": [1, 0]}, "empty"),
    ],
)
def test_schedule_errors(change, message):
    with pytest.raises(MixtureError, match=message):
        Schedule(**{"sizes": [1, 2], "probabilities": [0.5, 0.5], "length": 3, **change})
    with pytest.raises(MixtureError, match="an epoch must be a whole number of 0 or more, got -1"):
        Schedule([1], [1.0], length=1).rows(-1)


def test_an_epoch_that_is_known_is_not_worked_out_again(monkeypatch):
    schedule = Schedule([7, 3], probabilities([7, 3], 1.0), length=5, seed=1)
    made = []
    rows = Schedule.rows
    monkeypatch.setattr(Schedule, "rows", lambda self, epoch: (made.append(epoch), rows(self, epoch))[1])  # fmt: skip
    one_by_one = [int(schedule.draw([position])[0]) for position in range(15)]
    assert made == [0, 1, 2]
    assert one_by_one == schedule.draw(range(15)).tolist()
