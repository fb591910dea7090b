"""What a run should know of its data before it costs hours: nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence

from flix.tasks.columns import TASK, Row
from flix.tasks.errors import DataError
from flix.tasks.generative import Written
from flix.tasks.making import task_of
from flix.tasks.task import Task

_LOOKED_AT = 50  # rows of a cell


def unknown_notes(
    tasks: Sequence[Task], rows: Sequence[Row], cells: Sequence[str], *, refuse: bool = True
) -> list[str]:
    """What to say of targets that the tokenizer has no tokens for: the model cannot learn to write them.

    Args:
        tasks: the tasks.
        rows: the rows; the first ones of each cell are looked at.
        cells: the name of each row's cell.
        refuse: whether a cell whose targets are nothing but unknown tokens is an error.

    Raises:
        DataError: a cell's targets are nothing but unknown tokens.
    """
    by_cell: dict[str, list[Row]] = {}
    for row, cell in zip(rows, cells, strict=True):
        if len(held := by_cell.setdefault(cell, [])) < _LOOKED_AT:
            held.append(row)
    notes = []
    for cell, held in by_cell.items():
        counts = {text: n for row in held for text, n in _counted(tasks, row)}
        lost = [text for text, n in counts.items() if n[0]]
        if not lost:
            continue
        example = repr(lost[0][:40])
        if refuse and all(unknown == total for unknown, total in counts.values()):
            raise DataError(
                f"the tokenizer has no token for the targets of {cell}: each becomes nothing but "
                f"unknown tokens, such as {example}; take a model whose tokenizer knows them"
            )
        notes.append(
            f"the tokenizer turns parts of targets into unknown tokens, which the model cannot write: in {len(lost)} of "
            f"{len(counts)} targets of {cell} that were looked at, such as {example}"
        )
    return notes


def _counted(tasks: Sequence[Task], row: Row) -> list[tuple[str, tuple[int, int]]]:
    task = task_of(tasks, row.get(TASK, 0))
    if not isinstance(task, Written) or task.tokenizer.unk_token_id is None:
        return []
    _, target = task.example(row)
    return [] if target is None else [(target, task.unknown(target))]
