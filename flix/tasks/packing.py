"""Several short conversations or texts in one row, each under its own features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flix.core.errors import ConfigError
from flix.core.sampling.packing import pack
from flix.tasks.columns import TASK, Row
from flix.tasks.errors import DataError
from flix.tasks.making import task_of
from flix.tasks.task import Task


def packed(
    tasks: Sequence[Task], rows: Iterable[Row], groups: Sequence[str], length: int
) -> list[dict[str, Any]]:
    """Rows as a causal model reads them, packed: for ``FlixCollator(config, TaskCollator(...), per_token=True)``.

    Args:
        tasks: the tasks.
        rows: with ``flix_task``, their tasks' columns and the feature columns.
        groups: the feature columns.
        length: tokens of a packed row.

    Raises:
        ConfigError: a task of another kind; encoder-decoders and encoders do not read where rows begin.
        DataError: a row of more than ``length`` tokens.
    """
    for task in tasks:
        if task.kind != "causal":
            raise ConfigError(f"task {task.name!r}: packing is for causal tasks, not {task.kind}")
    encoded = []
    for row in rows:
        task = task_of(tasks, row.get(TASK, 0))
        read = task.read(row)
        if len(read["input_ids"]) > length:
            raise DataError(
                f"{task.place(row)}: {len(read['input_ids'])} tokens do not fit in packed rows of {length}; cut texts "
                "shorter (max_source, max_target) or pack into longer rows"
            )
        encoded.append({**{group: row.get(group) for group in groups}, **read})
    return pack(encoded, length, pad_token_id=tasks[0].pad) if encoded else []
