"""Speed or level: where runs of different lengths end, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flix.study.curves import Curve, Point, curves_of, headings, rows_of, steps_of
from flix.study.evidence import Study, read_scores
from tests.study import made


def study(folder: Path, steps: int, rates: dict[str, tuple[float, float]], **more: Any) -> Study:
    said = made.scores(rates, study="settle", **more)
    for arm in said["arms"].values():
        for run in arm["seeds"].values():
            run |= {"steps": steps, "seconds": steps / 10}
    return read_scores(made.write(folder / f"settle-{steps}", said))


def test_a_point_is_where_runs_of_one_length_end(tmp_path: Path) -> None:
    long = study(tmp_path, 4000, {"flix": (1.0, 0.0), "lora": (1.0, 1.0)})
    short = study(tmp_path, 1000, {"flix": (0.0, 1.0), "lora": (0.0, 0.0)})
    assert steps_of(long) == 4000
    found = {curve.arm: curve.points for curve in curves_of([long, short])}
    assert found == {
        "flix": (Point(1000, 100.0, 0.0, 100.0), Point(4000, 400.0, 100.0, 0.0)),
        "lora": (Point(1000, 100.0, 0.0, 0.0), Point(4000, 400.0, 100.0, 100.0)),
    }


def test_means_are_over_cells_then_seeds(tmp_path: Path) -> None:
    found = study(tmp_path, 10, {"flix": (0.6, 0.3)}, seeds=(0, 1, 2))
    runs = found.arms["flix"].runs.values()
    means = [
        sum(scores) / len(scores)
        for run in runs
        if (scores := [c.score for c in run.cells.values() if c.group == "seen"])
    ]
    assert curves_of([found])[0].points[0].seen == sum(means) / 3


def test_an_arm_that_is_not_finished_has_no_point_of_that_length(tmp_path: Path) -> None:
    rates = {"flix": (0.6, 0.3), "lora": (0.5, 0.2)}
    short = study(tmp_path, 10, rates, seeds=(0,))
    long = study(tmp_path, 20, rates, seeds=(0,), leave_out=[("lora", 0)])
    assert {c.arm: [p.steps for p in c.points] for c in curves_of([short, long])} == {"flix": [10, 20], "lora": [10]}  # fmt: skip
    assert curves_of([]) == []


def curve(name: str, *seen: float) -> Curve:
    points = [Point(100 * i, 10.0 * i, score) for i, score in enumerate(seen, 1)]
    return Curve(name, name.upper(), tuple(points))


def test_the_best_is_the_first_of_the_highest() -> None:
    found = curve("a", 10, 30, 30, 20)
    assert found.best == Point(200, 20.0, 30)
    assert found.reached(5) == found.points[0] and found.reached(31) is None


def test_settled_is_whose_longest_runs_gain_less_than_a_point() -> None:
    assert curve("a", 10, 30, 30.9).settled
    assert not curve("a", 10, 30, 31.0).settled
    assert not curve("a", 10).settled


def test_the_rows_say_when_the_others_best_was_passed() -> None:
    rows = rows_of([curve("flix", 20, 40, 50), curve("lora", 10, 30, 30)])
    assert {len(row) for row in rows} == {len(headings())}
    assert [row[5:] for row in rows] == [
        ("", ""), ("", ""), ("LORA (30.0): 200 steps", "no"), ("", ""), ("", ""), ("FLIX (50.0): never", "yes"),
    ]  # fmt: skip
    assert rows[0][:5] == ("FLIX", "100", "10", "20.0", "–")
