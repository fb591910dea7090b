"""Tasks from what a user says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flix.core.checks import is_whole, whole
from flix.core.errors import ConfigError, listed, near, shown
from flix.tasks.columns import Row, place
from flix.tasks.errors import DataError, ModelError
from flix.tasks.generative import Causal, Chat, Seq2Seq
from flix.tasks.headed import Classification, Regression, Tagging, labels_of
from flix.tasks.masked import Masked
from flix.tasks.task import Task

_ALL: tuple[type[Task], ...] = (Seq2Seq, Causal, Classification, Regression, Tagging, Masked)
_CLASSES = {made.kind: made for made in _ALL}
_COLUMNS = {
    "seq2seq": ("source", "target"),
    "causal": ("source", "target", "messages"),
    "classification": ("source", "target"),
    "regression": ("source", "target"),
    "tagging": ("tokens", "tags"),
    "masked": ("source",),
}
_LABELLED = ("classification", "tagging")

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
        name: its name.
        columns: the rows' columns by what they hold: ``source`` and ``target``, or for tagging ``tokens`` and
            ``tags``; these are also the default names. Conversations need ``messages``.
        prompt: a template for the source, with columns and groups of features in braces; ``{{`` stands for a brace.
        labels: the labels of classification and tagging, in the order of the head; :func:`collect_labels` finds them.
        max_source, max_target: longer texts are cut, in tokens.
        vocabulary: the number of rows of the model's embedding; a text with a larger id is refused.

    Raises:
        ConfigError: an unknown kind, a column that the kind does not have, labels for a kind without labels, or
            missing labels.
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
    if kind == "tagging" and prompt is not None:
        raise ConfigError(f"task {name!r}: tagging reads words as they are, and takes no prompt:")
    _check_tokenizer(kind, name, tokenizer)
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


def _check_tokenizer(kind: str, name: str, tokenizer: Any) -> None:
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise ModelError(
            f"task {name!r}: the tokenizer has no mask token, so its model fills no masks; take an encoder that does (BERT, "
            "XLM-R and their like), or leave the masked task out"
        )
    if kind != "tagging":
        return
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"task {name!r}: tagging needs a tokenizer that says which word a piece is of, and {type(tokenizer).__name__} "
            'does not (it has no "fast" version); take a model with one, or write the tags out as text (kind: seq2seq)'
        )
    try:
        tokenizer(["a", "b"], is_split_into_words=True)
    except Exception as error:  # an AssertionError of transformers 4: add_prefix_space=True
        raise ModelError(
            f"task {name!r}: the tokenizer does not take words ({shown(str(error))}); save one that does beside the model: "
            "AutoTokenizer.from_pretrained(name, add_prefix_space=True).save_pretrained(folder), and name it in tokenizer:"
        ) from error


def _labels(kind: str, name: str, labels: Sequence[str] | None) -> tuple[str, ...]:
    if kind not in _LABELLED:
        if labels:
            raise ConfigError(f"task {name!r}: {kind} has no labels")
        return ()
    if not labels or isinstance(labels, str):
        raise ConfigError(
            f"task {name!r}: {kind} needs the list of its labels; collect_labels finds them in rows"
        )
    for number, label in enumerate(labels):
        if not isinstance(label, str) or label in labels[:number]:
            raise ConfigError(
                f"task {name!r}: labels are names, each once; got {shown(label)} in {shown(list(labels))}"
            )
    return tuple(labels)


def collect_labels(
    kind: str, rows: Iterable[Row], columns: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """The labels that rows of classification or tagging have, sorted.

    Args:
        kind: the task's.
        rows: the rows, for training and for evaluation.
        columns: as for :func:`make_task`.

    Raises:
        DataError: a row without labels, or with something else in their column.
    """
    if kind not in _LABELLED:
        return ()
    named = {what: (columns or {}).get(what, what) for what in _COLUMNS[kind]}
    found: set[str] = set()
    for row in rows:
        found.update(labels_of(kind, row, named, place(row, kind)))
    return tuple(sorted(found))


def check_together(tasks: Sequence[Task]) -> None:
    """Refuse tasks that no one model can do.

    Raises:
        ConfigError: no tasks, generative ones of two kinds or beside others, or unlike ones of one name.
    """
    if not tasks:
        raise ConfigError("a model needs a task")
    kinds = list(dict.fromkeys(task.kind for task in tasks))
    written = [kind for kind in kinds if kind in GENERATIVE]
    if written and len(kinds) > 1:
        other = next(kind for kind in kinds if kind != written[0])
        raise ConfigError(
            f"{written[0]} and {other} cannot be combined: {listed(GENERATIVE)} each need a "
            f"model of their own; the other "
            "kinds share an encoder"
        )
    if not written:
        heads_of(tasks)


def heads_of(tasks: Sequence[Task]) -> tuple[list[Task], list[int]]:
    """The heads that tasks need: a task of each, and the number of each task's head. Tasks of one name share one.

    Raises:
        ConfigError: tasks of one name with other kinds or labels.
    """
    heads: dict[str, Task] = {}
    for task in tasks:
        first = heads.setdefault(task.name, task)
        if (first.kind, first.labels) != (task.kind, task.labels):
            said = [
                f"{t.kind} of {listed(t.labels, 5)}" if t.labels else t.kind for t in (first, task)
            ]
            raise ConfigError(
                f"tasks called {task.name!r} share a head, but have different kinds or labels: "
                f"{said[0]}, and {said[1]}; give them "
                "names of their own"
            )
    names = list(heads)
    return [*heads.values()], [names.index(task.name) for task in tasks]


def task_of(tasks: Sequence[Task], number: Any) -> Task:
    """The task with this number.

    Raises:
        DataError: there is none.
    """
    if not is_whole(number) or not 0 <= number < len(tasks):
        raise DataError(f"flix_task must be a number from 0 to {len(tasks) - 1}, got {number!r}")
    return tasks[int(number)]
