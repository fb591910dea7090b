"""The minutes are shared out so that every run ends in time, or it is said that they are too few."""

import pytest

from benchmarks.gpu_study import sharing
from benchmarks.gpu_study.sharing import Pace, Told, pace_of, runs_at_a_time, steps_for
from flix.core.errors import SettingsError


def told(run, start, step, evaluating, rows=450, logged=(20, 40, 60)):
    """A run that starts and answers in so many seconds, at an even pace."""
    found = [Told(run, {"event": "training", "step": 0, "steps": logged[-1]}, start)]
    found += [Told(run, {"event": "at", "step": logged[0]}, start + 0.5)]
    found += [
        Told(run, {"event": "step", "step": s, "loss": 3.0}, start + 2 + s * step) for s in logged
    ]
    end = found[-1].at
    found.append(Told(run, {"event": "evaluating", "step": 0, "steps": rows}, end + 1))
    return [*found, Told(run, {"event": "done"}, end + evaluating)]


def test_pretraining_has_its_share_and_minutes_have_bounds():
    assert sharing.pretraining_seconds(10) == 240
    for minutes in (0, 3.9, 601, float("nan")):
        with pytest.raises(SettingsError, match="--minutes: must be between 4 and 600"):
            sharing.pretraining_seconds(minutes)


def test_each_figure_is_that_of_the_worst_run():
    runs = [*told("flix", 20, 0.1, 8), *told("lora", 25, 0.05, 6), *told("wide", 22, 0.08, 12)]
    pace = pace_of(runs, batch=512)
    assert pace.start == 25 and pace.rows == 450 and pace.batch == pytest.approx(12)
    assert pace.step == pytest.approx(0.1)


def test_a_stretch_in_which_kernels_compile_does_not_count_and_a_slow_run_does():
    run = told("flix", 20, 0.1, 8, logged=(20, 40, 60, 80))
    compiles = [*run[:4], *(Told(o.run, o.event, o.at + 4) for o in run[4:])]
    assert pace_of(compiles, 512).step == pytest.approx(0.1)
    slow = told("lora", 20, 0.3, 8, logged=(20, 40, 60, 80))
    assert pace_of([*compiles, *slow], 512).step == pytest.approx(0.3)


@pytest.mark.parametrize("left_out", ["step", "evaluating", "done"])
def test_a_run_that_is_too_short_is_named(left_out):
    run = [o for o in told("flix, seed 0", 20, 0.1, 8) if o.event["event"] != left_out]
    with pytest.raises(SettingsError, match="flix, seed 0: too short to be timed"):
        pace_of(run, 512)
    with pytest.raises(SettingsError, match="no run was timed"):
        pace_of([], 512)


def test_steps_fill_the_time_with_some_to_spare():
    pace = Pace(start=20, step=0.1, batch=2, rows=450)
    steps = steps_for(230, pace, rows=4500, batch=1000)
    assert steps == int(0.85 * (230 - 20 - 2 * (1 + 4 / 4)) / 0.1)  # five batches
    assert pace.seconds(steps, 4500, 1000) < 230


def test_too_little_time_says_how_much_is_needed():
    pace = Pace(start=20, step=0.1, batch=2, rows=450)
    with pytest.raises(
        SettingsError, match=r"30 s are left, and 100 steps .* take 36 s; give more"
    ):
        steps_for(30, pace, rows=4500, batch=1000)


def test_runs_share_the_device_if_its_memory_allows():
    assert runs_at_a_time(78 * 2**30, 3) == 3
    assert runs_at_a_time(16 * 2**30, 3) == 1
