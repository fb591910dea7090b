"""One answer of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One row's answer.

    Attributes:
        source: what was asked, as a person reads it.
        target: what was wanted; None where the row does not say.
        output: what the model answers.
        right: whether that is what was wanted; None where the row does not say, and where there is no right and wrong.
        detail: by kind, see ``docs/tasks.md``; :func:`flix.tasks.scores` reads it.
    """

    source: str
    target: str | None
    output: str
    right: bool | None
    detail: dict[str, Any] = field(default_factory=dict)
