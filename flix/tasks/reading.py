"""What the heads of a batch say, as answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flix.tasks.answer import Answer
from flix.tasks.columns import Row
from flix.tasks.headed import Regression, Tagging
from flix.tasks.masked import Masked
from flix.tasks.task import IGNORED, Encoded, Task


def read_head(
    task: Task,
    row: Row,
    encoded: Encoded,
    out: Mapping[str, Any],
    labels: Tensor | None,
    place: int,
) -> Answer:
    """The answer of one row of a batch.

    Args:
        task: the row's.
        row: the row.
        encoded: what ``task.prompt`` made of it.
        out: the model's output, on the host.
        labels: of masked texts.
        place: the row's place in the batch.
    """
    if isinstance(task, Masked):
        assert labels is not None
        return _filled(task, row, out, labels, place)
    logits = out["logits"][place]
    if isinstance(task, Tagging):
        return _tagged(task, row, encoded["first"], logits)
    source, target = task.example(row)
    if isinstance(task, Regression):
        value = float(logits[0, 0])
        wanted = None if target is None else task.value(row)
        return Answer(source, target, f"{value:.6g}", None, {"value": value, "wanted": wanted})
    chances = torch.softmax(logits[0, : len(task.labels)].double(), -1).tolist()
    label = task.labels[max(range(len(chances)), key=chances.__getitem__)]
    right = None if target is None else label == target
    probabilities = dict(zip(task.labels, chances, strict=True))
    return Answer(source, target, label, right, {"probabilities": probabilities})


def _tagged(task: Tagging, row: Row, first: list[int | None], logits: Tensor) -> Answer:
    """Tags by word, None for words that are lost; right if all are."""
    likeliest = logits[:, : len(task.labels)].argmax(-1).tolist()
    tags = [None if place is None else task.labels[likeliest[place]] for place in first]
    source, target = task.example(row)
    wanted = task.tags(row) if target is not None else None
    lost = tags.count(None)
    output = " ".join(tag or "?" for tag in tags)
    detail = {"words": task.words(row), "tags": tags, "wanted": wanted, "lost": lost}
    detail["entities"] = task.metric == "entity_f1"
    return Answer(source, target, output, None if wanted is None else tags == wanted, detail)


def _filled(task: Masked, row: Row, out: Mapping[str, Any], labels: Tensor, place: int) -> Answer:
    """What was masked and what is said there; the loss is a sum over it."""
    counts = labels[place] != IGNORED
    wanted, said = labels[place][counts], out["predicted"][place][counts]
    number = len(wanted)
    detail = {
        "right": int((wanted == said).sum()),
        "masked": number,
        "loss": float(out["row_losses"][place]) * number,
    }
    words = [task.tokenizer.decode(ids) for ids in (wanted, said)]
    return Answer(task.asked(row), words[0], words[1], None, detail)
