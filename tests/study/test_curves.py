"""Curves of dev scores: seconds without evaluations, steps that were set back, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flix.study.curves import Curve, Point, headings, read_curve, read_curves, rows_of
from flix.study.evidence import EvidenceError


def log(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    return folder


def evaluation(step: int, seconds: float, seen: float | None, held: float | None = None) -> dict[str, Any]:  # fmt: skip
    scores = {} if seen is None else {"scores": {"seen": seen, "held_out": held}}
    return {"step": step, "seconds": seconds, "evaluation": {"loss": 1.0, **scores}}


def test_seconds_are_those_of_training_alone(tmp_path: Path) -> None:
    run = log(
        tmp_path,
        {"step": 10, "seconds": 10.0, "loss": 2.0},
        evaluation(10, 14.0, 20.0, 5.0),  # took 4
        {"step": 20, "seconds": 24.0, "loss": 1.5},
        evaluation(20, 30.0, 30.0),  # took 6
        {"step": 25, "seconds": 35.0, "loss": 1.4},
        evaluation(30, 45.0, 31.0),  # nothing was logged at its step: its own time is not known
    )
    curve = read_curve(run, "flix", "FLix")
    assert curve.points == (Point(10, 10.0, 20.0, 5.0), Point(20, 20.0, 30.0), Point(30, 35.0, 31.0))  # fmt: skip
    assert Curve.of_json(json.loads(json.dumps(curve.to_json()))) == curve


def test_a_step_that_was_trained_again_counts_as_it_was_last_written(tmp_path: Path) -> None:
    lines = [evaluation(10, 1, 20.0), evaluation(20, 2, 25.0), evaluation(10, 3, 22.0), evaluation(20, 4, 26.0)]  # fmt: skip
    points = read_curve(log(tmp_path, *lines), "flix", "FLix").points
    assert [(p.step, p.seen) for p in points] == [(10, 22.0), (20, 26.0)]


def test_a_log_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=r"no evaluation with scores.*training\.eval_every"):
        read_curve(log(tmp_path, evaluation(10, 1, None)), "flix", "FLix")
    with pytest.raises(EvidenceError, match="there is no"):
        read_curves(tmp_path, {"flix": "FLix"})


def curve(name: str, *seen: float) -> Curve:
    points = [Point(100 * i, 10.0 * i, score) for i, score in enumerate(seen, 1)]
    return Curve(name, name.upper(), tuple(points))


def test_the_best_is_the_first_of_the_highest() -> None:
    found = curve("a", 10, 30, 30, 20)
    assert found.best == Point(200, 20.0, 30)
    assert found.reached(5) == found.points[0] and found.reached(31) is None


def test_settled_is_who_gains_less_than_a_point_in_the_last_quarter() -> None:
    assert curve("a", 10, 20, 30, 30.9).settled
    assert not curve("a", 10, 20, 30, 31.0).settled
    assert not curve("a", 10).settled


def test_the_rows_say_when_the_others_best_was_passed() -> None:
    rows = rows_of([curve("flix", 20, 40, 45, 50), curve("lora", 10, 20, 30, 30)])
    assert len(headings()) == len(rows[0])
    assert rows[0] == ("FLIX", "50.0", "400", "40", "lora (30.0): step 200, 20 s", "no")
    assert rows[1] == ("LORA", "30.0", "300", "30", "flix (50.0): never", "yes")
