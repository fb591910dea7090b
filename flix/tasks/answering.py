"""What a model answers: one way for evaluation, prediction and the quickstart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from flix.core.errors import ConfigError
from flix.tasks.answer import Answer
from flix.tasks.collating import READ, TaskCollator, on_device
from flix.tasks.columns import TASK, Row
from flix.tasks.making import task_of
from flix.tasks.reading import read_head
from flix.tasks.task import Task
from flix.transformers import FlixCollator


def answers(
    model: Any,
    tasks: Sequence[Task],
    rows: Sequence[Row],
    collator: FlixCollator,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The model's answers in the order of the rows, computed in mixed batches of similar length.

    Args:
        model: an adapted model.
        tasks: the tasks.
        rows: with the column ``flix_task``, their tasks' columns and their feature columns; columns of answers may be
            missing.
        collator: a FlixCollator around a :class:`TaskCollator`; no features are dropped here.
        batch_size: rows at a time.
        max_new_tokens: the most tokens of a generated answer.
        num_beams: 1 is greedy.
        on_progress: called with the number of rows that are done.

    Raises:
        ConfigError: another kind of collator, or one for other tasks.
        DataError: a row that its task cannot read.
    """
    inner = getattr(collator, "collator", None)
    if not isinstance(inner, TaskCollator):
        raise ConfigError(
            f"answers needs a FlixCollator around a TaskCollator, got {type(collator).__name__}"
        )
    if list(tasks) != list(inner.tasks):
        raise ConfigError("answers needs the tasks that its collator was made with, in their order")
    of_row = [task_of(tasks, row.get(TASK, 0)) for row in rows]
    encoded = [task.prompt(row) for task, row in zip(of_row, rows, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: -len(encoded[i]["input_ids"]))
    asking = copy.copy(collator.evaluation())
    asking.collator = inner.prompts()
    found: dict[int, Answer] = {}
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = on_device(asking([{**rows[i], READ: encoded[i]} for i in part]), _device(model))
            if of_row[part[0]].generates:
                texts = _written(model, of_row[part[0]], batch, max_new_tokens, num_beams)
                made = [
                    _compared(of_row[i], rows[i], text) for i, text in zip(part, texts, strict=True)
                ]
            else:
                out, labels = on_device(model(**batch), torch.device("cpu")), batch.get("labels")
                labels = None if labels is None else labels.cpu()
                made = [
                    read_head(of_row[i], rows[i], encoded[i], out, labels, place)
                    for place, i in enumerate(part)
                ]
            found.update(zip(part, made, strict=True))
            if on_progress is not None:
                on_progress(start + len(part))
    return [found[i] for i in range(len(rows))]


def _compared(task: Task, row: Row, output: str) -> Answer:
    source, target = task.example(row)
    right = None if target is None else output == target.strip()
    return Answer(source, target, output, right)


def _written(
    model: Any, task: Task, batch: dict[str, Any], max_new_tokens: int, num_beams: int
) -> list[str]:
    out = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        pad_token_id=task.pad,
        eos_token_id=_ends(model, task),
    )
    if task.kind == "causal":
        out = out[:, batch["input_ids"].shape[1] :]
    texts = task.tokenizer.batch_decode(out, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _ends(model: Any, task: Task) -> int | list[int] | None:
    """The tokenizer's end mark, and those that the model is said to end with: chat models have several."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if said is None else [said] if isinstance(said, int) else list(said)
    if task.end is not None and task.end not in ends:
        ends.insert(0, task.end)
    return ends or None


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without gradients and without dropout."""
    trained = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(trained)


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
