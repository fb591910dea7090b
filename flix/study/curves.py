"""Speed or level: where each arm ends after few and after many steps.

Every point is a run of its own, whose learning rate fell to zero. Scores on the way of one long run would not do:
they rise when the rate falls, and stand still when it has fallen, whatever more steps would give.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flix.study.evidence import RunScores, Study

#: An arm has settled if its longest run ends less than this many points above the one before.
SETTLED = 1.0


@dataclass(frozen=True)
class Point:
    """Where the runs of one length end, as means over cells and seeds.

    Attributes:
        steps: how many steps they take.
        seconds: how many seconds they train, without evaluations.
        seen: the score of the cells that are trained on, in points.
        held_out: the score of the cells for the last word; None if there are none.
    """

    steps: int
    seconds: float
    seen: float
    held_out: float | None = None


@dataclass(frozen=True)
class Curve:
    """One arm's points, from its shortest runs to its longest."""

    arm: str
    title: str
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        """The first point with the highest score on seen cells."""
        return max(self.points, key=lambda point: (point.seen, -point.steps))

    def reached(self, score: float) -> Point | None:
        """The shortest runs that end with at least this score on seen cells."""
        return next((point for point in self.points if point.seen >= score), None)

    @property
    def settled(self) -> bool:
        """Whether the longest runs gained less than a point over the ones before."""
        return len(self.points) > 1 and self.points[-1].seen - self.points[-2].seen < SETTLED


def steps_of(study: Study) -> int:
    """How many steps a study's runs take; 0 if no run says."""
    return max((run.steps or 0 for arm in study.arms.values() for run in arm.runs.values()), default=0)  # fmt: skip


def curves_of(studies: Sequence[Study]) -> list[Curve]:
    """The curves of the arms that are finished in any of some studies of different lengths."""
    points: dict[str, list[Point]] = {}
    titles: dict[str, str] = {}
    for study in sorted(studies, key=steps_of):
        for arm in study.whole():
            runs = list(arm.runs.values())
            seen = _mean(runs, "seen")
            if seen is None:
                continue
            titles[arm.name] = arm.title
            seconds = statistics.fmean(run.seconds or 0.0 for run in runs)
            point = Point(steps_of(study), seconds, seen, _mean(runs, "last_word"))
            points.setdefault(arm.name, []).append(point)
    return [Curve(name, titles[name], tuple(some)) for name, some in points.items()]


def _mean(runs: Sequence[RunScores], group: str) -> float | None:
    """The mean over seeds of the means over a group's cells."""
    means = [
        statistics.fmean(scores)
        for run in runs
        if (scores := [cell.score for cell in run.cells.values() if cell.group == group])
    ]
    return statistics.fmean(means) if means else None


def headings() -> tuple[str, ...]:
    """The headings of :func:`rows_of`."""
    return (
        "method",
        "steps",
        "seconds",
        "seen",
        "zero-shot",
        "reaches the others' best",
        "settled",
    )


def rows_of(curves: Sequence[Curve]) -> list[tuple[str, ...]]:
    """For each arm and length: where it ends, and after the longest whether it settled and what it reached."""
    rows: list[tuple[str, ...]] = []
    for curve in curves:
        passed = []
        for other in curves:
            if other is not curve:
                at = curve.reached(other.best.seen)
                when = f"{at.steps:,} steps" if at else "never"
                passed.append(f"{other.title} ({other.best.seen:.1f}): {when}")
        for point in curve.points:
            last = point is curve.points[-1]
            held = "–" if point.held_out is None else f"{point.held_out:.1f}"
            settled = "–" if len(curve.points) == 1 else "yes" if curve.settled else "no"
            told = ("; ".join(passed), settled) if last else ("", "")
            rows.append((curve.title, f"{point.steps:,}", f"{point.seconds:,.0f}", f"{point.seen:.1f}", held, *told))  # fmt: skip
    return rows
