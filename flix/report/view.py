"""One run on the page, as the template takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flix.report.grid import Axes, Grid
from flix.report.records import Scored
from flix.report.runs import Run
from flix.report.updates import Updates


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns; the columns whose numbers are in ``texts`` are set to the left."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Sequence[int] = ()


@dataclass(frozen=True)
class Figure:
    """A drawing, its name for those who cannot see it, and what stands below it."""

    svg: Any
    label: str
    caption: str


@dataclass
class View:
    """One run on the page; what it lacks is None or empty."""

    run: Run
    number: int
    several: bool
    axes: Axes | None
    updates: Updates | None
    scores: Grid | None = None
    worst: tuple[str, str] | None = None
    worst_cell: Scored | None = None
    score_caption: str = ""
    difference: Grid | None = None
    difference_heading: str = ""
    difference_caption: str = ""
    cells: Table | None = None
    panels: list[Figure] = field(default_factory=list)
    shared: dict[str, Any] | None = None
    features: Table | None = None
    mixture: dict[str, Any] | None = None
    examples: dict[str, Any] | None = None
    command: str | None = None
    versions: Table | None = None
    data: Table | None = None

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def id(self) -> str:
        return f"run{self.number}"

    @property
    def config(self) -> str | None:
        return self.run.config

    def heading(self, what: str) -> str:
        """A heading that names the run, if there are several."""
        return f"{what}: {self.name}" if self.several else what
