"""Reads and checks a study's ``scores.json``; ``docs/results.md`` describes the format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import FlixError, listed, near
from flix.report.reading import Part, read_json

SCORES = "scores.json"
GROUPS = ("seen", "choosing", "last_word", "unseen")
#: What people call a group -> the group.
NAMES = {**{group: group for group in GROUPS}, "zero_shot": "last_word"}


class EvidenceError(FlixError, ValueError):
    """Scores cannot be read, or they lack what was asked for."""


@dataclass(frozen=True)
class CellScore:
    """A cell's score in one run.

    Attributes:
        features: by group, ``{"language": "deu", "task": "inflect"}``.
        group: ``"seen"``, ``"choosing"``, ``"last_word"``, or ``"unseen"``: not trained on for another reason.
        trained: how many of its rows the arms were trained on.
        rows: how many of its rows were evaluated.
        metric: the main metric's name.
        score: in points, 0 to 100; NaN if there is no score.
        right: whether each row was answered correctly, in order; None if answers are not simply right or wrong.
    """

    features: dict[str, str]
    group: str
    trained: int
    rows: int
    metric: str
    score: float
    right: NDArray[np.int8] | None


@dataclass(frozen=True)
class RunScores:
    """One arm with one seed: its cells by name, and what it cost."""

    cells: dict[str, CellScore]
    seconds: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class ArmScores:
    """One method.

    Attributes:
        name, title: its name in files, and as people read it.
        active_rank: the largest rank that a row activates.
        total_rank: the ranks of all features together.
        trainable: the number of parameters that train.
        choice: what was chosen for it on the choosing cells, as a text.
        runs: its runs, by seed.
    """

    name: str
    title: str
    active_rank: int | None = None
    total_rank: int | None = None
    trainable: int | None = None
    choice: str = ""
    runs: dict[int, RunScores] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study's scores.

    Attributes:
        name: the study's name.
        file: the file that they were read from.
        seeds: all planned seeds.
        arms: those with at least one finished run, in the study's order.
        planned: for each arm's name, its title and its seeds.
        claims: as the configuration states them.
        made: commit, machine, command, date, versions, data: as the file says.
    """

    name: str
    file: Path
    seeds: tuple[int, ...]
    arms: dict[str, ArmScores]
    planned: dict[str, tuple[str, tuple[int, ...]]]
    claims: tuple[Part, ...] = ()
    made: dict[str, Any] = field(default_factory=dict)

    def arm(self, name: str) -> ArmScores:
        """An arm with all its runs.

        Raises:
            EvidenceError: there is no such arm, or a run of it is not finished.
        """
        if name not in self.planned:
            raise EvidenceError(
                f"the study {self.name!r} has no arm {name!r}{near(name, list(self.planned))}; its arms are: "
                f"{listed(list(self.planned), 20)}"
            )
        if lacking := self.lacking([name]):
            raise EvidenceError(
                f"the study {self.name!r} is not finished: it lacks {listed(lacking, 5)}"
            )
        return self.arms[name]

    def lacking(self, arms: Sequence[str]) -> list[str]:
        """The runs of some arms that are not finished, as people read them: ``lora, seed 3``."""
        found = []
        for name in arms:
            _, seeds = self.planned.get(name, (name, self.seeds))
            done = self.arms[name].runs if name in self.arms else {}
            found += [f"{name}, seed {seed}" for seed in seeds if seed not in done]
        return found

    def whole(self) -> list[ArmScores]:
        """The arms with all their runs, in the study's order."""
        whole = [name for name in self.planned if not self.lacking([name])]
        return [self.arms[name] for name in whole if name in self.arms and self.arms[name].runs]


def read_scores(path: Path) -> Study:
    """Read a study's ``scores.json``.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        EvidenceError: there is no such file.
        ReportError: it is damaged, or something in it is missing or of the wrong kind; it is named.
        OSError: it cannot be read.
    """
    file = path / SCORES if path.is_dir() else path
    part = read_json(file)
    if part is None:
        raise EvidenceError(f"there is no {str(file)!r}; flix study writes it after its first run")
    seeds = tuple(seed for entry in part.get("seeds").parts() if (seed := entry.whole()) is not None)  # fmt: skip
    shared = {name: dict(said.items()) for name, said in part.get("cells").items()}
    arms = {name: _arm(name, said, shared) for name, said in part.get("arms").needed().items()}
    planned = {
        name: (said.value if isinstance(said.value, str) else name, seeds)
        for name, said in part.get("planned").items()
    }
    if not planned:
        planned = {name: (arm.title, seeds or tuple(arm.runs)) for name, arm in arms.items()}
    for entry in part.get("missing").parts():
        name, _, number = str(entry.text()).rpartition(", seed ")
        if number.isdigit():  # whatever else the file says: what is missing is missing
            title, known = planned.get(name, (name, ()))
            planned[name] = (title, tuple(sorted({*known, int(number)})))
    for name in arms:
        if name not in planned:
            raise EvidenceError(f"{part.where}: arms: {name!r} is not among the planned arms")
    keys = (
        "command",
        "commit",
        "machine",
        "date",
        "versions",
        "data",
        "steps",
        "missing",
        "relatives",
        "parts",
        "pretraining",
    )
    return Study(
        name=part.get("study").text() or file.parent.name,
        file=file,
        seeds=seeds,
        arms={name: arms[name] for name in planned if name in arms},
        planned=planned,
        claims=tuple(part.get("claims").parts()),
        made={key: part.get(key).value for key in keys},
    )


def _arm(name: str, said: Part, shared: Mapping[str, Mapping[str, Part]]) -> ArmScores:
    runs: dict[int, RunScores] = {}
    for seed, run in said.get("seeds").needed().items():
        if not seed.isdigit():
            raise EvidenceError(f"{run.where}: a seed must be a whole number, got {seed!r}")
        cells = {}
        for cell, entry in run.get("cells").needed().items():
            own = {key: part.value for key, part in entry.items()}
            more = {key: part.value for key, part in shared.get(cell, {}).items()}
            cells[cell] = _cell(Part({**more, **own}, entry.where))
        runs[int(seed)] = RunScores(cells, run.get("seconds").number(), run.get("steps").whole())
    return ArmScores(
        name=name,
        title=said.get("title").text() or name,
        active_rank=said.get("active_rank").whole(),
        total_rank=said.get("total_rank").whole(),
        trainable=said.get("trainable").whole(),
        choice=_choice(said.get("choice")),
        runs=runs,
    )


def _choice(said: Part) -> str:
    if not isinstance(said.value, dict):
        return said.plain()
    return ", ".join(f"{key.rpartition('.')[2]} {part.plain()}" for key, part in said.items())


def _cell(said: Part) -> CellScore:
    group = said.get("group").needed().text()
    if group not in GROUPS:
        raise EvidenceError(f"{said.where}: group must be one of {', '.join(GROUPS)}, got {group!r}")  # fmt: skip
    score = said.get("score").number()
    right = _right(said.get("right"))
    rows = said.get("rows").whole() or 0
    if right is not None and len(right) != rows:
        raise EvidenceError(
            f"{said.where}: the cell has {rows} rows, but right has {len(right)} entries"
        )
    return CellScore(
        features={key: _feature(part) for key, part in said.get("features").items()},
        group=group,
        trained=said.get("train").whole() or 0,
        rows=rows,
        metric=said.get("metric").text() or "score",
        score=math.nan if score is None else score,
        right=right,
    )


def _feature(part: Part) -> str:
    if isinstance(part.value, list):
        return "+".join(str(entry.text()) for entry in part.parts())
    return str(part.needed().text())


def _right(part: Part) -> NDArray[np.int8] | None:
    """From a list of 0 and 1, or the same as a text of digits; None where any row has no right or wrong."""
    given = part.value
    if given is None or given == [] or (isinstance(given, list) and None in given):
        return None
    values = list(given) if isinstance(given, str) else [entry.value for entry in part.parts()]
    found = [_BITS.get(value) if isinstance(value, str | int) else None for value in values]
    if None in found:
        raise EvidenceError(f"{part.where} must be null or hold only 0 and 1")
    return np.array(found, np.int8)


_BITS: dict[str | int, int] = {0: 0, 1: 1, "0": 0, "1": 1}
