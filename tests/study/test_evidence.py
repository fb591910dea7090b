"""scores.json as it is read: in either form of its answers, and refused where it is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flix.core.errors import FlixError
from flix.study.evidence import EvidenceError, read_scores
from tests.study import made

NAME = "language=deu,task=inflect"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    study = read_scores(made.write(tmp_path, made.scores()))
    assert study.name == read_scores(tmp_path / "scores.json").name == "made"
    arm = study.arm("lora-compute")
    assert (arm.title, arm.active_rank, arm.trainable) == ("lora, compute", 13, 200_000)
    assert arm.choice == "learning_rate 0.004"
    cell = arm.runs[1].cells[NAME]
    assert (cell.features, cell.group, cell.trained) == ({"language": "deu", "task": "inflect"}, "seen", 50)  # fmt: skip
    assert cell.right is not None and cell.score == pytest.approx(100 * cell.right.mean())
    assert study.seeds == (0, 1) and study.made["commit"] == "0123abc"


def test_answers_may_be_a_text_of_digits(tmp_path: Path) -> None:
    said = made.scores()
    cell = said["arms"]["flix"]["seeds"]["0"]["cells"][NAME]
    given = cell["right"]
    cell["right"] = "".join(map(str, given))
    found = read_scores(made.write(tmp_path, said)).arm("flix").runs[0].cells[NAME].right
    assert np.array_equal(found, given)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda cell: cell.update(right=[0, 2]), "right must be null or hold only 0 and 1"),
        (lambda cell: cell.update(right=[0, 1]), "20 rows, but right has 2 entries"),
        (lambda cell: cell.update(right="01x"), "right must be null or hold only 0 and 1"),
        (
            lambda cell: cell.update(group="other"),
            "group must be one of seen, choosing, last_word, unseen",
        ),
        (lambda cell: cell.pop("group"), "group is missing"),
        (lambda cell: cell.update(score="high"), "score must be a number"),
    ],
)
def test_damage_is_named_with_its_place(
    tmp_path: Path, damage: Callable[[Any], object], text: str
) -> None:
    said = made.scores()
    damage(said["arms"]["flix"]["seeds"]["0"]["cells"][NAME])
    with pytest.raises(FlixError, match=f"scores.json.*flix.*{NAME}.*{text}"):
        read_scores(made.write(tmp_path, said))


def test_no_scores_and_no_seed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=r"there is no .*flix study writes it"):
        read_scores(tmp_path)
    said = made.scores()
    said["arms"]["flix"]["seeds"]["first"] = said["arms"]["flix"]["seeds"].pop("0")
    with pytest.raises(EvidenceError, match="a seed must be a whole number, got 'first'"):
        read_scores(made.write(tmp_path, said))


def test_an_arm_that_nobody_planned_is_refused(tmp_path: Path) -> None:
    said = made.scores()
    del said["planned"]["flix"]
    with pytest.raises(EvidenceError, match="'flix' is not among the planned"):
        read_scores(made.write(tmp_path, said))
