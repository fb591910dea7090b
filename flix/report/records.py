"""What a run's files hold, as the report needs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flix.core.errors import FeatureError
from flix.core.features.cells import Cell, cell_of, read_cell
from flix.report.reading import Part, ReportError

Point = tuple[float, float]
"""A step, and a value at it."""

_LONGEST = 400  # characters of an example's text
_KEPT = 20  # examples of a cell that are right, and as many that are wrong
_TEXTS = 700_000  # characters of all examples


def read_features(part: Part) -> Cell:
    """The features of a cell's entry: ``features``, or else what the cell's name says.

    Raises:
        ReportError: neither can be read.
    """
    said = part.get("features").value
    name = str(part.get("cell").needed().text())
    try:
        return cell_of(said if isinstance(said, dict) else read_cell(name))
    except FeatureError as error:
        raise ReportError(f"{part.where}: {error}") from None


@dataclass(frozen=True)
class Scored:
    """A cell's scores.

    Attributes:
        name: the cell, as flix.data names it.
        features: by group.
        kind, task: of what kind its rows are, and whose head answers; may be unknown.
        seen: whether it was trained on; False: it was held out.
        rows: how many rows were evaluated.
        metric: the main metric's name.
        score: the main metric; None if it is no number.
        interval: its 95 % interval by bootstrap.
        scores: all metrics.
    """

    name: str
    features: Cell
    kind: str
    task: str
    seen: bool
    rows: int
    metric: str
    score: float | None
    interval: tuple[float, float] | None
    scores: dict[str, float | None]

    @classmethod
    def read(cls, part: Part) -> Scored:
        """Raises ReportError: something is missing or of the wrong kind."""
        ends = [end.number() for end in part.get("interval").parts()]
        if ends and len(ends) != 2:
            raise ReportError(f"{part.where}: interval must be [low, high], got {ends}")
        low, high = ends or (None, None)
        seen = part.get("seen").flag()
        return cls(
            name=str(part.get("cell").needed().text()),
            features=read_features(part),
            kind=part.get("kind").text() or "",
            task=part.get("task").text() or "",
            seen=True if seen is None else seen,
            rows=part.get("rows").whole() or 0,
            metric=part.get("metric").text() or "score",
            score=part.get("score").number(),
            interval=None if low is None or high is None else (low, high),
            scores={key: value.number() for key, value in part.get("scores").items()},
        )


@dataclass(frozen=True)
class LeftOut:
    """What leaving a feature out costs.

    Attributes:
        feature: its name, ``language=hau``.
        loss: over the rows that it is active in.
        without: the loss of the same rows when it is left out.
        rows: how many there are.
    """

    feature: str
    loss: float | None
    without: float | None
    rows: int

    @property
    def cost(self) -> float | None:
        """By how much the loss rises."""
        return None if self.loss is None or self.without is None else self.without - self.loss


@dataclass(frozen=True)
class Metrics:
    """What metrics.json says."""

    cells: tuple[Scored, ...]
    left_out: tuple[LeftOut, ...]

    @classmethod
    def read(cls, part: Part) -> Metrics:
        """Raises ReportError: something is missing or of the wrong kind, or a cell occurs twice."""
        cells: dict[str, Scored] = {}
        for entry in part.get("cells").needed().parts():
            cell = Scored.read(entry)
            if cell.name in cells:
                raise ReportError(f"{entry.where}: the cell {cell.name!r} occurs twice")
            cells[cell.name] = cell
        left = [
            LeftOut(name, e.get("loss").number(), e.get("without").number(), e.get("rows").whole() or 0)
            for name, e in part.get("left_out").items()
        ]  # fmt: skip
        return cls(tuple(cells.values()), tuple(left))

    def mean(self, seen: bool) -> float | None:
        """The mean of the main scores over the cells that were trained on, or over those held out."""
        found = [c.score for c in self.cells if c.seen is seen and c.score is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Drawn:
    """A cell of the mixture.

    Attributes:
        name, features: the cell.
        rows: rows that it has for training; of a held-out one, rows that are never drawn.
        probability: with which a row is drawn from it.
        drawn: rows drawn so far.
        held_out: whether it is never trained on.
        evaluation_rows: rows that it is evaluated on.
    """

    name: str
    features: Cell
    rows: int
    probability: float
    drawn: int
    held_out: bool
    evaluation_rows: int

    @classmethod
    def read(cls, part: Part) -> Drawn:
        """Raises ReportError: something is missing or of the wrong kind."""
        return cls(
            name=str(part.get("cell").needed().text()),
            features=read_features(part),
            rows=part.get("rows").whole() or 0,
            probability=part.get("probability").number() or 0.0,
            drawn=part.get("drawn").whole() or 0,
            held_out=bool(part.get("held_out").flag()),
            evaluation_rows=part.get("evaluation_rows").whole() or 0,
        )


@dataclass(frozen=True)
class Sampling:
    """What mixture.json says: cells, the temperature they are drawn with, their cap, an epoch's rows."""

    cells: tuple[Drawn, ...]
    temperature: float | None
    cap: str
    epoch_size: int | None

    @classmethod
    def read(cls, part: Part) -> Sampling:
        """Raises ReportError: something is missing or of the wrong kind."""
        return cls(
            cells=tuple(Drawn.read(entry) for entry in part.get("cells").needed().parts()),
            temperature=part.get("temperature").number(),
            cap=part.get("cap").plain(),
            epoch_size=part.get("epoch_size").whole(),
        )


@dataclass
class Curves:
    """What log.jsonl says; a step that occurs twice (the run was resumed) counts as it was last written.

    Attributes:
        loss, by_feature: in training.
        evaluated: the loss in evaluation, of the cells that are trained on where the log tells them apart.
        held_out: that of the others.
        evaluated_by_feature: in evaluation.
        scores, held_out_scores: means of the cells' main scores, in the same way.
    """

    loss: list[Point] = field(default_factory=list)
    by_feature: dict[str, list[Point]] = field(default_factory=dict)
    evaluated: list[Point] = field(default_factory=list)
    held_out: list[Point] = field(default_factory=list)
    evaluated_by_feature: dict[str, list[Point]] = field(default_factory=dict)
    scores: list[Point] = field(default_factory=list)
    held_out_scores: list[Point] = field(default_factory=list)

    @classmethod
    def read(cls, lines: Iterator[Part]) -> Curves:
        """Raises ReportError: a value of the wrong kind."""
        trained: dict[int, Part] = {}
        evaluated: dict[int, Part] = {}
        for line in lines:
            step = line.get("step").needed().whole()
            assert step is not None
            found = evaluated if line.get("evaluation").value is not None else trained
            for later in [s for s in reversed(found) if s > step]:
                del found[later]  # written before the run was set back to an earlier step
            found[step] = line
        curves = cls()
        for step, line in trained.items():
            _put(curves.loss, step, line.get("loss").number())
            for name, part in line.get("by_feature").items():
                _put(curves.by_feature.setdefault(name, []), step, part.number())
        for step, line in evaluated.items():
            curves._put_evaluation(step, line.get("evaluation"))
        return curves

    def _put_evaluation(self, step: int, said: Part) -> None:
        seen, held_out = said.get("seen").number(), said.get("held_out").number()
        _put(self.evaluated, step, seen if seen is not None else said.get("loss").number())
        _put(self.held_out, step, held_out)
        for name, loss in said.get("by_feature").items():
            _put(self.evaluated_by_feature.setdefault(name, []), step, loss.number())
        if (scores := said.get("scores")).value is not None:
            _put(self.scores, step, scores.get("seen").number())
            _put(self.held_out_scores, step, scores.get("held_out").number())
            return
        known = [cell.get("score").number() for _, cell in said.get("cells").items()]
        found = [score for score in known if score is not None]
        _put(self.scores, step, sum(found) / len(found) if found else None)


def _put(points: list[Point], step: int, value: float | None) -> None:
    if value is not None:
        points.append((step, value))


@dataclass(frozen=True)
class Example:
    """A row, what the model answered, and whether that is right (None: the kind knows no right and wrong)."""

    cell: str
    source: str
    target: str
    output: str
    right: bool | None


@dataclass(frozen=True)
class Examples:
    """Some examples of every cell, and how many there were in all."""

    kept: tuple[Example, ...]
    count: int

    @classmethod
    def read(cls, lines: Iterator[Part]) -> Examples:
        """The first right and wrong ones of every cell, as many as fit a page.

        Raises:
            ReportError: something is missing or of the wrong kind.
        """
        found: dict[tuple[str, bool | None], list[Example]] = {}
        count = 0
        for line in lines:
            count += 1
            cell, right = str(line.get("cell").needed().text()), line.get("right").flag()
            some = found.setdefault((cell, right), [])
            if len(some) < _KEPT:
                source, target, output = (
                    _cut(line.get(key).plain()) for key in ("source", "target", "output")
                )
                some.append(Example(cell, source, target, output, right))
        return cls(tuple(_fitting(list(found.values()))), count)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _fitting(lists: list[list[Example]]) -> list[Example]:
    """So many of each list that all of them stay below the most characters; one of each at least."""
    size, most = 0, _KEPT
    for taken in range(_KEPT):
        size += sum(
            len(e.source) + len(e.target) + len(e.output) + 30
            for some in lists
            for e in some[taken : taken + 1]
        )
        if size > _TEXTS:
            most = max(taken, 1)
            break
    return [example for some in lists for example in some[:most]]


def read_config(file: Path) -> str | None:
    """A run's configuration as text; None if there is none.

    Raises:
        ReportError: it is no text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ReportError(f"{file.name} of {str(file.parent)!r} is damaged: {error}") from None
