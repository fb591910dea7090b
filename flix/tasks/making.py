"""Tasks from what a user says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flix.core.checks import whole
from flix.core.errors import ConfigError, listed, near, shown
from flix.tasks.errors import DataError, ModelError
from flix.tasks.generative import Causal, Chat, Seq2Seq
from flix.tasks.task import Task

_CLASSES: dict[str, type[Task]] = {made.kind: made for made in (Seq2Seq, Causal)}
_COLUMNS = {
    "seq2seq": ("source", "target"),
    "causal": ("source", "target", "messages"),
}

KINDS = (*_CLASSES,)
"""The kinds of tasks."""

GENERATIVE = tuple(kind for kind, made in _CLASSES.items() if made.generates)
"""Those whose answers are written."""


def make_task(
    kind: str,
    tokenizer: Any,
    *,
    name: str,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    labels: Sequence[str] | None = None,
    max_source: int = 512,
    max_target: int = 256,
    vocabulary: int | None = None,
) -> Task:
    """A task.

    Args:
        kind: one of :data:`KINDS`.
        tokenizer: a transformers tokenizer.
        name: what it is called.
        columns: the rows' columns by what they hold, ``source`` and ``target`` by default; conversations need
            ``messages``.
        prompt: template of the source, with columns and groups of features in braces; ``{{`` is a brace.
        labels: those of classification and tagging.
        max_source, max_target: longer texts are cut, in tokens.
        vocabulary: rows of the model's embedding; a text with a larger id is refused.

    Raises:
        ConfigError: an unknown kind, a column that the kind does not have, or labels that it does not have or lacks.
        ModelError: a tokenizer that cannot do what the kind needs.
    """
    if kind not in _CLASSES:
        raise ConfigError(
            f"task {name!r}: no kind {kind!r}{near(str(kind), KINDS)}; the kinds are: {listed(KINDS)}"
        )
    given = dict(columns or {})
    for what, column in given.items():
        if what not in _COLUMNS[kind]:
            raise ConfigError(
                f"task {name!r}: {kind} has no column {what!r}{near(what, _COLUMNS[kind])}; it has: "
                f"{listed(_COLUMNS[kind])}"
            )
        if not isinstance(column, str) or not column:
            raise ConfigError(
                f"task {name!r}: the column of {what!r} must be a name, got {shown(column)}"
            )
    made = _CLASSES[kind]
    if kind == "causal" and "messages" in given:
        made = Chat
        _check_template(name, tokenizer, prompt)
    else:
        given = {what: given.get(what, what) for what in _COLUMNS[kind] if what != "messages"}
    return made(
        name=name,
        tokenizer=tokenizer,
        columns=given,
        template=prompt,
        labels=_labels(kind, name, labels),
        max_source=whole(max_source, "max_source", 2),
        max_target=whole(max_target, "max_target", 2),
        vocabulary=vocabulary,
    )


def _check_template(name: str, tokenizer: Any, prompt: str | None) -> None:
    if prompt is not None:
        raise ConfigError(
            f"task {name!r}: messages: and prompt: exclude each other; the chat template makes the prompt"
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            f"task {name!r}: the tokenizer has no chat template, which messages: needs; take the model's chat or instruct "
            "version or its tokenizer, or give columns with prompt and answer (source:, target:)"
        )


def _labels(kind: str, name: str, labels: Sequence[str] | None) -> tuple[str, ...]:
    if labels:
        raise ConfigError(f"task {name!r}: {kind} has no labels")
    return ()


def check_together(tasks: Sequence[Task]) -> None:
    """Refuse tasks that no one model can do.

    Raises:
        ConfigError: no tasks, generative ones of two kinds or beside others, or two of one name with heads.
    """
    if not tasks:
        raise ConfigError("a model needs a task")
    kinds = list(dict.fromkeys(task.kind for task in tasks))
    written = [kind for kind in kinds if kind in GENERATIVE]
    if written and len(kinds) > 1:
        other = next(kind for kind in kinds if kind != written[0])
        raise ConfigError(
            f"{written[0]} and {other} do not go together: {listed(GENERATIVE)} each need a model of their own; the other "
            "kinds share an encoder"
        )


def task_of(tasks: Sequence[Task], number: Any) -> Task:
    """The task with this number.

    Raises:
        DataError: there is none.
    """
    if not isinstance(number, int) or not 0 <= number < len(tasks):
        raise DataError(f"flix_task must be a number from 0 to {len(tasks) - 1}, got {number!r}")
    return tasks[number]
