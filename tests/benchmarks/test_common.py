"""Rounds, medians and limits."""

import contextlib
import itertools

import pytest

from benchmarks import common
from benchmarks.common import Arm, Bar, Figure, Result, figure, interleave, over


def test_the_median_and_its_quartiles():
    assert figure([3.0, 1.0, 2.0, 5.0, 4.0]) == Figure(3.0, 2.0, 4.0)
    assert figure([1.0, 2.0]).median == 1.5
    assert figure([1.0, 2.0, 3.0, 4.0, 5.0]).spread == 1.0
    with pytest.raises(ValueError, match="at least one"):
        figure([])


def test_ratios_are_taken_within_rounds():
    """A machine that slows down by ten for a round changes no ratio; a ratio of medians would be another."""
    times = {"base": [1.0, 10.0, 1.0], "arm": [1.5, 15.0, 3.0]}
    found = over(times, "base")
    assert found["arm"].median == 1.5
    assert found["base"] == Figure(1.0, 1.0, 1.0)


def test_rounds_interleave_and_turn_round(monkeypatch):
    ran, resets, seen = [], [], []
    arms = [
        Arm(name, lambda n=name: ran.append(n) or n, reset=lambda n=name: resets.append(n))
        for name in "ab"
    ]
    clock = itertools.count()
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(clock)))
    times = interleave(arms, 3, warmup=1, seen=lambda name, out: seen.append((name, out)))
    assert "".join(ran) == "ab" + "ba" + "ab" + "ba"
    assert ran == resets
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert len(seen) == 6
    assert all(name == out for name, out in seen)


def test_what_is_around_a_run_is_not_timed(monkeypatch):
    clock, order = itertools.count(), []

    @contextlib.contextmanager
    def around():
        next(clock)
        order.append("in")
        yield
        next(clock)
        order.append("out")

    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(clock)))
    seconds, out = common.once(Arm("a", lambda: order.append("run") or 7, around=around))
    assert (seconds, out, order) == (1.0, 7, ["in", "run", "out"])


def test_a_limit_leaves_three_rounds():
    times = interleave([Arm("a", lambda: None)], 50, warmup=0, limit=0.0)
    assert len(times["a"]) == 3


def test_two_arms_of_one_name_are_refused():
    with pytest.raises(ValueError, match="one name"):
        interleave([Arm("a", lambda: 0), Arm("a", lambda: 0)], 1)


@pytest.mark.parametrize(
    ("value", "limit", "at_most", "met"),
    [
        (1.18, 1.18, True, True),
        (Figure(1.184, 1.1, 1.2), 1.18, True, True),  # 1.18 as it is shown
        (1.186, 1.18, True, False),
        (2.5, 2.0, False, True),
        (1.9, 2.0, False, False),
    ],
)
def test_limits(value, limit, at_most, met):
    bar = Bar("time", value, limit, at_most)
    assert bar.met is met
    assert Result("part", "Title", bars=[bar]).to_dict()["bars"][0]["met"] is met
