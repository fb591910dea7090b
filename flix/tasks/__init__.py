"""Tasks: rows to tokens and labels, models with what each task needs, answers and their scores (``docs/tasks.md``).

::

    task = make_task("tagging", tokenizer, name="ner", labels=collect_labels("tagging", rows))
    model = train_heads(adapt(load_base(name, [task]), config))
    collator = FlixCollator(config, TaskCollator([task], tokenizer))
    found = answers(model, [task], rows, collator)
    scores(task.kind, found)

Each name is imported on demand, and torch only with the names that need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flix.tasks.answer import Answer
    from flix.tasks.answering import answers
    from flix.tasks.bases import (
        enable_checkpointing,
        load_base,
        load_model,
        load_tokenizer,
        locate,
        model_layers,
        train_heads,
    )
    from flix.tasks.checking import label_notes, unknown_notes
    from flix.tasks.collating import TaskCollator
    from flix.tasks.columns import TASK, WHERE
    from flix.tasks.errors import DataError, ModelError, missing_extra
    from flix.tasks.heads import HeadedModel, HeadedOutput
    from flix.tasks.making import GENERATIVE, KINDS, collect_labels, make_task
    from flix.tasks.packing import PackingCollator, packed
    from flix.tasks.pretrained import load_pretrained, tasks_of, tokenizer_of
    from flix.tasks.scoring import interval, scores
    from flix.tasks.task import Task

_HOMES = {
    "answer": ("Answer",),
    "answering": ("answers",),
    "bases": (
        "enable_checkpointing",
        "load_base",
        "load_model",
        "load_tokenizer",
        "locate",
        "model_layers",
        "train_heads",
    ),
    "checking": ("label_notes", "unknown_notes"),
    "collating": ("TaskCollator",),
    "columns": ("TASK", "WHERE"),
    "errors": ("DataError", "ModelError", "missing_extra"),
    "heads": ("HeadedModel", "HeadedOutput"),
    "making": ("GENERATIVE", "KINDS", "collect_labels", "make_task"),
    "packing": ("PackingCollator", "packed"),
    "pretrained": ("load_pretrained", "tasks_of", "tokenizer_of"),
    "scoring": ("interval", "scores"),
    "task": ("Task",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "GENERATIVE",
    "KINDS",
    "TASK",
    "WHERE",
    "Answer",
    "DataError",
    "HeadedModel",
    "HeadedOutput",
    "ModelError",
    "PackingCollator",
    "Task",
    "TaskCollator",
    "answers",
    "collect_labels",
    "enable_checkpointing",
    "interval",
    "label_notes",
    "load_base",
    "load_model",
    "load_pretrained",
    "load_tokenizer",
    "locate",
    "make_task",
    "missing_extra",
    "model_layers",
    "packed",
    "scores",
    "tasks_of",
    "tokenizer_of",
    "train_heads",
    "unknown_notes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"flix.tasks.{_HOME_OF[name]}"), name)
