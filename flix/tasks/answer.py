"""One answer of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One row's answer.

    Attributes:
        source: the question, as a person reads it.
        target: the expected answer; None if the row has none.
        output: the model's answer.
        right: whether the answer is the expected one; None if the row has none, or if there is no right and wrong.
        detail: by kind, see ``docs/tasks.md``; :func:`flix.tasks.scores` reads it.
    """

    source: str
    target: str | None
    output: str
    right: bool | None
    detail: dict[str, Any] = field(default_factory=dict)
