"""Speed or level: how the dev score of each arm changes over steps and seconds, from the runs' ``log.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.report.reading import read_lines
from flix.study.evidence import EvidenceError

LOG = "log.jsonl"
#: An arm has settled if the last quarter of its steps gained less than this many points.
SETTLED = 1.0


@dataclass(frozen=True)
class Point:
    """One evaluation during training.

    Attributes:
        step: the training step.
        seconds: the seconds of training until then, without evaluations.
        seen: the mean score of the cells that are trained on, in points.
        held_out: the mean score of the other cells; None if there are none.
    """

    step: int
    seconds: float
    seen: float
    held_out: float | None = None


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run, in their order."""

    arm: str
    title: str
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        """The first evaluation with the highest score on seen cells."""
        return max(self.points, key=lambda point: (point.seen, -point.step))

    def reached(self, score: float) -> Point | None:
        """The first evaluation with at least this score on seen cells."""
        return next((point for point in self.points if point.seen >= score), None)

    @property
    def settled(self) -> bool:
        """Whether the last quarter of the steps gained less than a point."""
        last = self.points[-1].step
        before = [point.seen for point in self.points if point.step <= 0.75 * last]
        return bool(before) and self.best.seen - max(before) < SETTLED

    def to_json(self) -> dict[str, Any]:
        """The form in which ``docs/results`` keeps it."""
        points = [[p.step, round(p.seconds, 1), p.seen, p.held_out] for p in self.points]
        return {"arm": self.arm, "title": self.title, "points": points}

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> Curve:
        """Read what :meth:`to_json` wrote."""
        return cls(said["arm"], said["title"], tuple(Point(*point) for point in said["points"]))


def read_curve(run: Path, arm: str, title: str) -> Curve:
    """The evaluations with scores of one run.

    Seconds of training are those of the log minus the seconds of evaluations. These are known only if the log has a
    line of the same step before the evaluation.

    Raises:
        EvidenceError: the run has no log, or no evaluation in it has scores.
        ReportError: the log is damaged.
    """
    file = run / LOG
    if not file.is_file():
        raise EvidenceError(f"there is no {str(file)!r}; flix train writes it")
    points: list[Point] = []
    logged, taken = (-1, 0.0), 0.0
    for line in read_lines(file):
        step, seconds = line.get("step").needed().whole() or 0, line.get("seconds").number() or 0.0
        said = line.get("evaluation")
        if said.value is None:
            logged = (step, seconds)
            continue
        if logged[0] == step:
            spent = seconds - logged[1]
            seconds, taken = logged[1] - taken, taken + spent
        else:
            seconds -= taken
        scores = said.get("scores")
        if scores.value is None or (seen := scores.get("seen").number()) is None:
            continue
        points = [point for point in points if point.step < step]  # set back to an earlier step
        points.append(Point(step, seconds, seen, scores.get("held_out").number()))
    if not points:
        raise EvidenceError(
            f"{str(file)!r} has no evaluation with scores; train with training.eval_every, and training.best: seen.score"
        )
    return Curve(arm, title, tuple(points))


def read_curves(study: Path, arms: Mapping[str, str], seed: int = 0) -> list[Curve]:
    """The curves of some arms of a study with one seed.

    Raises:
        EvidenceError: a run has no log, or no evaluation in it has scores.
    """
    runs = study / "runs"
    return [read_curve(runs / f"{arm}-{seed}", arm, title) for arm, title in arms.items()]


def headings() -> tuple[str, ...]:
    """The headings of :func:`rows_of`."""
    return ("method", "best dev score", "at step", "seconds", "reaches the others' best", "settled")


def rows_of(curves: Sequence[Curve]) -> list[tuple[str, ...]]:
    """For each arm: its best dev score, when it reached it, and when it reached the best score of each other arm."""
    rows: list[tuple[str, ...]] = []
    for curve in curves:
        passed = []
        for other in curves:
            if other is not curve:
                at = curve.reached(other.best.seen)
                when = f"step {at.step:,}, {at.seconds:,.0f} s" if at else "never"
                passed.append(f"{other.arm} ({other.best.seen:.1f}): {when}")
        best = curve.best
        rows.append(
            (
                curve.title, f"{best.seen:.1f}", f"{best.step:,}", f"{best.seconds:,.0f}", "; ".join(passed),
                "yes" if curve.settled else "no",
            )
        )  # fmt: skip
    return rows
