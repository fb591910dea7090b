"""Rows of any tasks to one padded batch: what :class:`flix.transformers.FlixCollator` wraps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flix.core.errors import ConfigError
from flix.tasks.columns import TASK, Row
from flix.tasks.making import check_together, task_of
from flix.tasks.task import IGNORED, Encoded, Task


class TaskCollator:
    """Rows to a batch: ``input_ids`` and ``attention_mask`` ``[batch, length]``, and ``labels`` of that shape.

    A row's column ``flix_task`` says which of the tasks it is of. Rows that hold ``input_ids`` are taken as
    :meth:`Task.read` gave them; packed rows (with ``position_ids``) get no attention mask, so that models read the
    boundaries from the positions.

    Args:
        tasks: the tasks; together they must fit one model.
        tokenizer: a transformers tokenizer; it is saved with checkpoints.

    Raises:
        ConfigError: tasks that do not go together.
    """

    whole_rows = True  # FlixCollator hands on feature columns, too: prompts are made of them

    def __init__(self, tasks: Sequence[Task], tokenizer: Any) -> None:
        check_together(tasks)
        self.tasks = tuple(tasks)
        self.tokenizer = tokenizer
        self.asks = False

    def prompts(self) -> TaskCollator:
        """A collator like this one that leaves out the answers; a causal model's prompts are padded on the left."""
        other = copy.copy(self)
        other.asks = True
        return other

    def encoded(self, row: Row) -> Encoded:
        """A row as its task reads it."""
        if "input_ids" in row:
            return dict(row)
        task = task_of(self.tasks, row.get(TASK, 0))
        return task.prompt(row) if self.asks else task.read(row)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Make a batch."""
        if not rows:
            raise ConfigError("a batch needs a row")
        encoded = [self.encoded(row) for row in rows]
        pad, left = self.tasks[0].pad, self.asks and self.tasks[0].kind == "causal"
        ids = [row["input_ids"] for row in encoded]
        batch = {"input_ids": padded(ids, pad, left)}
        if all("position_ids" in row for row in encoded):
            batch["position_ids"] = padded([row["position_ids"] for row in encoded], 0)
        else:
            batch["attention_mask"] = padded([[1] * len(row) for row in ids], 0, left)
        if not self.asks:
            batch["labels"] = padded([row["labels"] for row in encoded], IGNORED)
        return batch


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> Tensor:
    """Rows as an int64 tensor ``[rows, longest]``, filled up on the right or on the left."""
    longest = max(map(len, rows))
    full = torch.full((len(rows), longest), pad, dtype=torch.long)
    for number, row in enumerate(rows):
        values = torch.tensor(row, dtype=torch.long)
        if left:
            full[number, longest - len(row) :] = values
        else:
            full[number, : len(row)] = values
    return full


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
