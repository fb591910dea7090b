"""Plain containers for the quickstart's data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

HeldOut = Literal["tuning", "test"]


@dataclass(frozen=True, slots=True)
class Example:
    """One pair: ``source`` opens with the task's tag (``"num: zwölf"``)."""

    source: str
    target: str

    @property
    def text(self) -> str:
        """The source without its task tag."""
        return self.source.partition(": ")[2]


@dataclass(frozen=True, slots=True)
class Cell:
    """The data of one language in one task.

    ``held_out`` is None for cells that are trained on. The others have no training pairs and are
    for zero-shot evaluation: those marked ``"tuning"`` may guide choices, those marked ``"test"``
    are only for the final figures.
    """

    language: str
    task: str
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    held_out: HeldOut | None
    low_resource: bool

    @property
    def name(self) -> str:
        """``language/task``."""
        return f"{self.language}/{self.task}"


@dataclass(frozen=True)
class QuickstartData:
    """All cells, with the axes they lie on; their rows are files in ``folder``, too."""

    languages: tuple[str, ...]
    tasks: tuple[str, ...]
    family_of_task: dict[str, str]
    cells: tuple[Cell, ...]
    folder: Path = Path()
    seed: int = 0
    sources: dict[str, str] = field(default_factory=dict)

    def cell(self, language: str, task: str) -> Cell:
        """The cell of a language and a task; KeyError where the sources have none."""
        for cell in self.cells:
            if cell.language == language and cell.task == task:
                return cell
        raise KeyError(f"no cell {language}/{task}")

    @property
    def families(self) -> tuple[str, ...]:
        """Task families, in the order of their first task."""
        return tuple(dict.fromkeys(self.family_of_task[task] for task in self.tasks))

    def trained(self) -> Iterator[Cell]:
        """Cells that have training pairs."""
        return (cell for cell in self.cells if cell.held_out is None)

    def zero_shot(self, half: HeldOut | None = None) -> Iterator[Cell]:
        """Held-out cells, all of them or one half."""
        return (
            cell
            for cell in self.cells
            if cell.held_out is not None and half in (None, cell.held_out)
        )
