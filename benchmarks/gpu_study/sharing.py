"""Shares out the minutes: seconds of pretraining, steps of the runs, runs at a time. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flix.core.errors import SettingsError

PRETRAINING = 0.4
"""The share of the minutes that pretraining takes."""
CLOSING = 25.0
"""Seconds that are left at the end, in which runs that are not done save a checkpoint."""
CAUTION = 0.85
"""Of the time that is left, the share that is planned: the pace may fall while all runs are under way."""
FIRST_BATCH = 4
"""How many times as long the first batch of evaluation rows takes, since kernels are compiled for it. On an H100, five
batches took no longer than the one that was timed."""
FEWEST_STEPS = 100
LEAST_MINUTES = 4.0
MEMORY_A_RUN = 6 * 2**30
"""Bytes that a run may take on the device, its CUDA context included."""


@dataclass(frozen=True)
class Told:
    """What was told of a run: its name, the event, and the seconds since all runs were started."""

    run: str
    event: Mapping[str, Any]
    at: float


@dataclass(frozen=True)
class Pace:
    """How fast the slowest of some runs was.

    Attributes:
        start: seconds until it trains.
        step: seconds a step, in the median of its stretches: in an early one, kernels may be compiled.
        batch: seconds that the first batch of evaluation rows takes.
        rows: how many rows it answered.
    """

    start: float
    step: float
    batch: float
    rows: int

    def seconds(self, steps: int, rows: int, batch: int) -> float:
        """How long a run takes.

        Args:
            steps: its steps.
            rows: the rows that it answers at its end.
            batch: rows that it answers at a time.
        """
        batches = 1 + (math.ceil(rows / batch) - 1) / FIRST_BATCH
        return self.start + steps * self.step + batches * self.batch


def pretraining_seconds(minutes: float) -> float:
    """How many seconds of so many minutes pretraining takes.

    Raises:
        SettingsError: the minutes are too few for what comes after it.
    """
    if not LEAST_MINUTES <= minutes <= 600:
        raise SettingsError(
            f"--minutes: must be between {LEAST_MINUTES:g} and 600, got {minutes:g}"
        )
    return PRETRAINING * 60 * minutes


def pace_of(told: Sequence[Told], batch: int) -> Pace:
    """The pace of the slowest run. Each figure is the worst that a run has; all of them were under way together.

    Args:
        told: what the runs told.
        batch: how many rows they answered at a time.

    Raises:
        SettingsError: a run was too short to be timed.
    """
    starts, steps, batches, rows = [], [], [], 0
    for run in dict.fromkeys(one.run for one in told):
        mine = [one for one in told if one.run == run]
        at = {one.event["event"]: one.at for one in reversed(mine)}  # the first of each
        marks = [(one.event["step"], one.at) for one in mine if one.event["event"] == "step"]
        stretches = [
            (after - before) / (last - first)
            for (first, before), (last, after) in pairwise(marks)
            if last > first
        ]
        if not stretches or not {"training", "evaluating", "done"} <= at.keys():
            raise SettingsError(f"{run}: too short to be timed; it told of {len(marks)} steps")
        starts.append(at["training"])
        steps.append(statistics.median(stretches))
        answered = next(o.event["steps"] for o in mine if o.event["event"] == "evaluating")
        # From its last step on: before it answers, it computes their loss.
        batches.append((at["done"] - marks[-1][1]) / math.ceil(answered / batch))
        rows = max(rows, answered)
    if not starts:
        raise SettingsError("no run was timed")
    return Pace(max(starts), max(steps), max(batches), rows)


def steps_for(left: float, pace: Pace, rows: int, batch: int) -> int:
    """How many steps all runs take.

    Args:
        left: seconds until all of them must be done.
        pace: of the slowest run.
        rows: how many rows each answers at its end, at most.
        batch: how many rows each answers at a time.

    Raises:
        SettingsError: there is no time for :data:`FEWEST_STEPS` steps.
    """
    around = pace.seconds(0, rows, batch)
    steps = int(CAUTION * (left - around) / pace.step)
    if steps < FEWEST_STEPS:
        needed = around + FEWEST_STEPS * pace.step / CAUTION
        raise SettingsError(
            f"{left:.0f} s are left, and {FEWEST_STEPS} steps with the evaluation take {needed:.0f} s; give more --minutes "
            "and the same --out: what is done is kept"
        )
    return steps


def runs_at_a_time(free: int, runs: int) -> int:
    """How many runs share the device: all of them if its free bytes allow, otherwise one after the other."""
    return runs if free >= runs * MEMORY_A_RUN else 1
