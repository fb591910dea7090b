"""Plain containers for the study's data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Split = Literal["train", "dev", "test"]
Half = Literal["tuning", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


class Pair(NamedTuple):
    """What a model reads (without a tag), and what it should write."""

    source: str
    target: str


@dataclass(frozen=True)
class Cell:
    """The data of one language in one task.

    Attributes:
        language: ISO 639-3.
        task: see :data:`flix.study.words.TASKS`.
        train, dev, test: the pairs. ``dev`` is for choices, ``test`` for the last word.
        held_out: None for cells that are trained on. A ``"tuning"`` cell has only ``dev`` pairs, and a ``"test"`` cell
            only ``test`` pairs, so that nobody bases a choice on a last-word cell by mistake.
        low_resource: whether the study keeps the language's data small in all tasks.
    """

    language: str
    task: str
    train: tuple[Pair, ...]
    dev: tuple[Pair, ...]
    test: tuple[Pair, ...]
    held_out: Half | None = None
    low_resource: bool = False

    @property
    def name(self) -> str:
        """``task/language``, which is also the name of its files."""
        return f"{self.task}/{self.language}"

    def pairs(self, split: Split) -> tuple[Pair, ...]:
        """The pairs of a split."""
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]


@dataclass(frozen=True)
class WordsData:
    """All cells.

    Attributes:
        cells: by language, then by task.
        families: the family of each task.
        branches: the language family of each language.
        seed: what the data was drawn with.
        trained: by language, the keys of all words that any task trains on (see :mod:`.splits`).
        fingerprint: what the data was made from; see :func:`flix.study.words.load_words`.
    """

    cells: tuple[Cell, ...]
    families: Mapping[str, str]
    branches: Mapping[str, str]
    seed: int = 0
    trained: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)
    fingerprint: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def cell(self, task: str, language: str) -> Cell:
        """The cell of a task and a language.

        Raises:
            KeyError: there is none.
        """
        for cell in self.cells:
            if (cell.task, cell.language) == (task, language):
                return cell
        raise KeyError(f"no cell {task}/{language}")

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages, in the cells' order."""
        return tuple(dict.fromkeys(cell.language for cell in self.cells))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of :attr:`families`."""
        found = {cell.task for cell in self.cells}
        return tuple(task for task in self.families if task in found)

    def held_out(self, half: Half | None = None) -> tuple[Cell, ...]:
        """The cells that are never trained on: all of them, or one half."""
        return tuple(c for c in self.cells if c.held_out is not None and half in (None, c.held_out))

    def rows(self, split: Split) -> Iterator[dict[str, str]]:
        """The rows of a split in the form that ``flix.data`` reads, cell after cell.

        A row has ``source`` and ``target`` and the groups ``language``, ``task``, ``family`` (of the task), ``branch``
        (of the language) and ``shared``, which is the same everywhere.
        """
        for cell in self.cells:
            for pair in cell.pairs(split):
                yield self.row(cell.language, cell.task, pair)

    def row(self, language: str, task: str, pair: Pair) -> dict[str, str]:
        """One row."""
        return {
            "language": language,
            "task": task,
            "family": self.families[task],
            "branch": self.branches[language],
            "shared": "all",
            "source": pair.source,
            "target": pair.target,
        }
