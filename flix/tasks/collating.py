"""Rows of any tasks to one padded batch: what :class:`flix.transformers.FlixCollator` wraps."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flix.core.errors import ConfigError
from flix.tasks.columns import TASK, WHERE, Row
from flix.tasks.errors import DataError
from flix.tasks.making import check_together, heads_of, task_of
from flix.tasks.masked import Masked, own_key
from flix.tasks.task import IGNORED, Encoded, Task
from flix.transformers.numbering import NUMBER

READ = "flix_read"
"""The column of what a task made of a row beforehand."""

_OWN = ("input_ids", "labels", "value", "maskable", "position_ids")


class TaskCollator:
    """Turns rows into a batch: ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[batch, length]``.

    A row's column ``flix_task`` says to which task it belongs. If there are heads, ``head`` ``[batch]`` is the number
    of each row's head. ``values``, float32 ``[batch]``, are the numbers for regression, and NaN in other rows. Rows
    with ``input_ids`` are used as :meth:`Task.read` returned them. Packed rows (with ``position_ids``) get no
    attention mask, so that models read the boundaries from the positions. Masks depend on the seed and on the row's
    number in the run, which FlixCollator provides, so that a resumed run masks the same tokens; in evaluation they
    depend on the text itself.

    Args:
        tasks: the tasks; together they must fit one model.
        tokenizer: a transformers tokenizer, which is saved with checkpoints.
        seed: the seed of the masks.

    Raises:
        ConfigError: tasks that cannot be combined.
    """

    whole_rows = True  # FlixCollator hands on feature columns, too: prompts are made of them

    def __init__(self, tasks: Sequence[Task], tokenizer: Any, *, seed: int = 0) -> None:
        check_together(tasks)
        self.tasks: tuple[Task, ...] = tuple(tasks)
        self._heads = [] if tasks[0].generates else heads_of(tasks)[1]
        self.tokenizer = tokenizer
        self.seed = seed
        self.asks = False
        self.trains = True

    @property
    def needs_numbers(self) -> bool:
        """Whether rows must carry their place in the run."""
        return self.trains and any(isinstance(task, Masked) for task in self.tasks)

    @property
    def own_columns(self) -> tuple[str, ...]:
        """The columns that rows must keep for this collator."""
        return (
            *dict.fromkeys((TASK, WHERE, *_OWN, *(c for task in self.tasks for c in task.reads))),
        )

    def evaluation(self) -> TaskCollator:
        """A collator like this one, which masks a text in the same way wherever it occurs."""
        other = copy.copy(self)
        other.trains = False
        return other

    def prompts(self) -> TaskCollator:
        """A collator like this one that leaves out the answers, with causal prompts padded on the left."""
        other = self.evaluation()
        other.asks = True
        return other

    def encoded(self, row: Row) -> Encoded:
        """A row as its task reads it, with masks if the task needs them."""
        task = task_of(self.tasks, row.get(TASK, 0))
        if READ in row:
            found: Encoded = row[READ]
        elif "input_ids" in row:
            found = {name: row[name] for name in _OWN if row.get(name) is not None}
        else:
            found = task.prompt(row) if self.asks else task.read(row)
        if isinstance(task, Masked):
            return task.masked(found, self._key(row, found))
        return found

    def _key(self, row: Row, encoded: Encoded) -> tuple[int | str, ...]:
        if not self.trains:
            return own_key(encoded)
        if NUMBER not in row:
            raise DataError(
                "a text is masked by its place in the run, which this row does not carry; use FlixTrainer or "
                "numbered(loader), or evaluation() where nothing is trained"
            )
        return (self.seed, *map(int, row[NUMBER]))

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
        if not self.asks or any("labels" in row for row in encoded):
            length = batch["input_ids"].shape[1]
            none = [IGNORED] * (length if self._headed else 0)
            batch["labels"] = padded([row.get("labels", none) for row in encoded], IGNORED)
        if self._headed:
            batch["head"] = torch.tensor([self._heads[row.get(TASK, 0)] for row in rows])
            if not self.asks and any(task.kind == "regression" for task in self.tasks):
                batch["values"] = torch.tensor([row.get("value", math.nan) for row in encoded])
        return batch

    @property
    def _headed(self) -> bool:
        return not self.tasks[0].generates


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
