"""Several short conversations or texts in one row, each under its own features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flix.core.config.config import FlixConfig
from flix.core.errors import ConfigError
from flix.core.features.encoding import Unknown
from flix.core.sampling.packing import pack
from flix.tasks.collating import TaskCollator
from flix.tasks.columns import TASK, Row
from flix.tasks.errors import DataError
from flix.tasks.making import task_of
from flix.tasks.task import Task
from flix.transformers.collator import FlixCollator
from flix.transformers.numbering import NUMBER


class PackingCollator(FlixCollator):
    """A :class:`FlixCollator` around a :class:`TaskCollator` that packs each batch of a causal model.

    A batch is put into as few rows of ``length`` tokens as possible, each text with its own features. So a step sees
    the same texts as without packing, and a run resumes at the same place. Feature dropout draws once for each packed
    row, by the place of its first text in the run. Evaluation and prompts are not packed.

    Args:
        config, collator, columns, unknown, seed: as for :class:`FlixCollator`.
        length: the number of tokens in a packed row.

    Raises:
        ConfigError: tasks that are not causal.
    """

    def __init__(
        self,
        config: FlixConfig,
        collator: TaskCollator,
        columns: Mapping[str, str] | None = None,
        *,
        length: int,
        unknown: Unknown | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(config, collator, columns, unknown=unknown, seed=seed, per_token=True)
        _check_causal(collator.tasks)
        self._tasks = collator.tasks
        self.length: int | None = length

    def evaluation(self, group_weights: Mapping[str, float] | None = None) -> FlixCollator:
        """As :meth:`FlixCollator.evaluation`, for rows that are not packed."""
        other = super().evaluation(group_weights)
        assert isinstance(other, PackingCollator)
        other.length, other.per_token = None, False
        return other

    def __call__(
        self, rows: Sequence[Row], *, step: int | None = None, first_row: int = 0
    ) -> dict[str, Any]:
        """Pack, and make a batch of ``[packed rows, length]``."""
        rows = list(rows)
        if self.length is None:
            return super().__call__(rows, step=step, first_row=first_row)
        self._check(rows)
        numbers = self._numbers(rows, step, first_row)
        if numbers is not None:
            rows = [{**row, NUMBER: number} for row, number in zip(rows, numbers, strict=True)]
        kept = (*self.columns.values(), *([NUMBER] if numbers is not None else []))
        together = packed(self._tasks, rows, kept, self.length)
        for row in together if numbers is not None else ():
            row[NUMBER] = row[NUMBER][0]
        return super().__call__(together)


def packed(
    tasks: Sequence[Task], rows: Iterable[Row], groups: Sequence[str], length: int
) -> list[dict[str, Any]]:
    """Rows as a causal model reads them, packed: for ``FlixCollator(config, TaskCollator(...), per_token=True)``.

    Args:
        tasks: the tasks.
        rows: with ``flix_task``, their tasks' columns and the feature columns.
        groups: the feature columns.
        length: the number of tokens in a packed row.

    Raises:
        ConfigError: a task that is not causal; encoder-decoders and encoders do not read where rows start.
        DataError: a row of more than ``length`` tokens.
    """
    _check_causal(tasks)
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


def _check_causal(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if task.kind != "causal":
            raise ConfigError(f"task {task.name!r}: packing is for causal tasks, not {task.kind}")
