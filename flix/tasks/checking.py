"""What a run should know of its data before it costs hours: nothing here changes anything."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from flix.core.errors import listed
from flix.tasks.columns import TASK, Row
from flix.tasks.errors import DataError
from flix.tasks.generative import Written
from flix.tasks.headed import Headed, Tagging
from flix.tasks.making import task_of
from flix.tasks.task import Encoded, Task

_LOOKED_AT = 50  # rows of a cell
_MUCH = 0.1  # of a cell's pieces


def unknown_notes(
    tasks: Sequence[Task], rows: Sequence[Row], cells: Sequence[str], *, refuse: bool = True
) -> list[str]:
    """Notes on texts for which the tokenizer has no tokens, and on words that are cut off.

    A model cannot write a target that turns into unknown tokens, and learns little from such a source. A word that is
    cut off gets no tag.

    Args:
        tasks: the tasks.
        rows: the rows; only the first ones of each cell are checked.
        cells: the name of each row's cell.
        refuse: whether a cell whose targets consist only of unknown tokens is an error.

    Raises:
        DataError: the targets of a cell consist only of unknown tokens.
    """
    by_cell: dict[str, list[Row]] = {}
    for row, cell in zip(rows, cells, strict=True):
        if len(held := by_cell.setdefault(cell, [])) < _LOOKED_AT:
            held.append(row)
    notes: list[str] = []
    lost: dict[int, dict[str, float]] = {}
    for cell, held in by_cell.items():
        of_task: dict[int, list[Row]] = {}
        for row in held:
            of_task.setdefault(row.get(TASK, 0), []).append(row)
        for number, some in of_task.items():
            task = task_of(tasks, number)
            if isinstance(task, Written):
                notes += _targets(task, some, cell, refuse)
            elif isinstance(task, Headed):
                read = [task.prompt(row) for row in some]
                notes += _sources(task, read, cell)
                if isinstance(task, Tagging) and (part := _lost(read)):
                    lost.setdefault(number, {})[cell] = part
    return notes + [_cut(tasks[number], parts) for number, parts in lost.items()]


def _targets(task: Written, rows: Sequence[Row], cell: str, refuse: bool) -> Iterator[str]:
    if task.tokenizer.unk_token_id is None:
        return
    targets = [target for row in rows if (target := task.example(row)[1]) is not None]
    counts = {target: task.unknown(target) for target in targets}
    lost = [target for target, n in counts.items() if n[0]]
    if not lost:
        return
    example = repr(lost[0][:40])
    if refuse and all(unknown == total for unknown, total in counts.values()):
        raise DataError(
            f"the tokenizer has no token for the targets of {cell}: each becomes nothing but "
            f"unknown tokens, such as {example}; take a model whose tokenizer knows them"
        )
    yield (
        f"the tokenizer turns parts of targets into unknown tokens, which the model cannot write: in {len(lost)} of "
        f"{len(counts)} targets of {cell} that were checked, such as {example}"
    )


def _sources(task: Task, read: Sequence[Encoded], cell: str) -> Iterator[str]:
    ids = [i for encoded in read for i in encoded["input_ids"]]
    mark = task.tokenizer.unk_token_id
    unknown = 0 if mark is None else ids.count(mark)
    if unknown >= _MUCH * len(ids):
        yield (
            f"the tokenizer reads {unknown} of {len(ids)} pieces of {cell} as unknown, in "
            f"{len(read)} rows that were checked: the model sees little of these texts"
        )


def _lost(read: Sequence[Encoded]) -> float:
    """The part of the words that have no place."""
    words = sum(len(encoded["first"]) for encoded in read)
    lost: int = sum(encoded["first"].count(None) for encoded in read)
    return lost / max(words, 1)


def _cut(task: Any, parts: Mapping[str, float]) -> str:
    worst = sorted(parts, key=parts.__getitem__, reverse=True)
    said = listed((f"{cell} {100 * parts[cell]:.1f} %" for cell in worst), 5)
    return (
        f"task {task.name!r}: words beyond the {task.longest} tokens that are read, or of which "
        f"the tokenizer makes nothing, get no tag and count as wrong: of {said}"
    )


def label_notes(task: Task, training: Collection[str], evaluation: Collection[str]) -> list[str]:
    """Notes on labels that no training row has, because a head cannot learn them.

    Args:
        task: the task.
        training: the labels of its training rows.
        evaluation: the labels of its evaluation rows.
    """
    unseen = [label for label in task.labels if label not in training]
    asked = [label for label in unseen if label in evaluation]
    idle = [label for label in unseen if label not in evaluation]
    notes = []
    if asked:
        notes.append(
            f"task {task.name!r}: no training row has the labels {listed(asked)}, which evaluation rows have; they will be "
            "answered wrongly"
        )
    if idle:
        notes.append(f"task {task.name!r}: no row has the labels {listed(idle)}")
    return notes
