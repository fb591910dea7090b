"""The quickstart's numbers, dates and names for the study, which uses nothing else from the quickstart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flix.core.errors import listed
from flix.data.errors import DataError, missing_extra
from flix.study.words.design import LANGUAGES, QUICKSTART_TASKS
from flix.study.words.tasks import Row
from flix.study.words.types import SPLITS, Half


@dataclass(frozen=True)
class Borrowed:
    """Cells of the quickstart.

    Attributes:
        families: the family of each task.
        rows: by (task, language), the rows in the quickstart's splits.
        held_out: by (task, language), the half of each cell that is never trained on.
        sources: the packages that the rows come from, and their versions.
    """

    families: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[tuple[str, str], list[Row]] = field(default_factory=dict)
    held_out: Mapping[tuple[str, str], Half] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)


def borrow(
    cache_dir: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Borrowed:
    """Load the quickstart's data and take what the study uses.

    Raises:
        MissingFrameworkError: a package of the extra ``quickstart`` is not installed.
    """
    try:
        from flix.quickstart.data import load_data

        return borrowed(load_data(cache_dir, seed, progress))
    except ImportError as error:
        raise missing_extra(
            "the quickstart's numbers, dates and names", "quickstart", error
        ) from None


def borrowed(data: Any) -> Borrowed:
    """The part that the study uses of what ``flix.quickstart.data.load_data`` returned.

    Raises:
        DataError: the quickstart lacks a task of the study.
    """
    if lacking := [task for task in QUICKSTART_TASKS if task not in data.family_of_task]:
        raise DataError(
            f"the quickstart has no task {lacking[0]!r}; its tasks are: {listed(data.family_of_task)}"
        )
    codes = {info.quickstart: code for code, info in LANGUAGES.items() if info.quickstart}
    rows: dict[tuple[str, str], list[Row]] = {}
    held_out: dict[tuple[str, str], Half] = {}
    for cell in data.cells:
        if cell.task not in QUICKSTART_TASKS or cell.language not in codes:
            continue
        where = cell.task, codes[cell.language]
        rows[where] = [
            Row(example.text, example.target, (example.text,), split)
            for split in SPLITS
            for example in getattr(cell, split)
        ]
        if cell.held_out is not None:
            held_out[where] = cell.held_out
    families = {task: data.family_of_task[task] for task in QUICKSTART_TASKS}
    return Borrowed(families, rows, held_out, dict(data.sources))
