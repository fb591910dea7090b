"""What a task is: how a row becomes tokens and labels, and what a person reads of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flix.data import forms
from flix.tasks import columns as reading
from flix.tasks.columns import Row
from flix.tasks.errors import DataError

IGNORED = -100
"""The label of tokens that count for no loss."""

Encoded = dict[str, Any]
"""A row as a model reads it: ``input_ids``, and by kind ``labels`` (one a token), ``label`` or ``value``."""


@dataclass(frozen=True)
class Task:
    """A kind of task with its columns, labels and lengths; :func:`flix.tasks.make_task` makes one.

    Attributes:
        name: its name, which is also the name of its head.
        tokenizer: a transformers tokenizer.
        columns: the rows' columns, by what they hold.
        template: the template of the prompt, with columns and groups of features in braces; None for the source
            alone.
        labels: the labels of classification and tagging, in the order of the head.
        max_source, max_target: longer texts are cut.
        vocabulary: the number of rows of the model's embedding; larger ids are refused.
    """

    kind: ClassVar[str]
    generates: ClassVar[bool] = False
    name: str
    tokenizer: Any = field(repr=False, compare=False)
    columns: Mapping[str, str]
    template: str | None = None
    labels: tuple[str, ...] = ()
    max_source: int = 512
    max_target: int = 256
    vocabulary: int | None = None

    @property
    def metric(self) -> str:
        """The name of the main score."""
        raise NotImplementedError

    @property
    def answer_column(self) -> str:
        """The column with the expected answer."""
        return self.columns["target"]

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns that rows may need."""
        return (*self.columns.values(), *reading.names_in(self.template or ""))

    def read(self, row: Row) -> Encoded:
        """A row with its answer, as the model sees it in training.

        Raises:
            DataError: columns that are missing or have unexpected contents; tokens that the model does not have.
        """
        raise NotImplementedError

    def prompt(self, row: Row) -> Encoded:
        """A row without its answer."""
        raise NotImplementedError

    def example(self, row: Row) -> tuple[str, str | None]:
        """The source and the expected answer, as a person reads them; the answer is None if the row has none."""
        raise NotImplementedError

    def answered(self, row: Row) -> bool:
        """Whether a row has an expected answer."""
        return row.get(self.answer_column) is not None

    def described(self) -> dict[str, Any]:
        """The arguments of :func:`flix.tasks.make_task` other than the tokenizer, in a form for JSON."""
        return {
            "kind": self.kind,
            "name": self.name,
            "columns": dict(self.columns),
            "prompt": self.template,
            "labels": list(self.labels),
            "max_source": self.max_source,
            "max_target": self.max_target,
        }

    # For the kinds

    def place(self, row: Row) -> str:
        """Where a row comes from, for messages."""
        return reading.place(row, self.name)

    def text(self, row: Row, what: str) -> str:
        """The text of a column."""
        column, where = self.columns[what], self.place(row)
        return forms.text(reading.value_of(row, column, where), column, where)

    def asked(self, row: Row) -> str:
        """The prompt's text: the template filled, or the source."""
        if self.template is None:
            return self.text(row, "source")
        return reading.fill(self.template, row, self.place(row))

    def known(self, ids: list[int], text: str) -> list[int]:
        """Check that the model's embedding has these ids.

        Raises:
            DataError: an id that it does not have.
        """
        if self.vocabulary is not None and ids and max(ids) >= self.vocabulary:
            raise DataError(
                f"the tokenizer gives the id {max(ids)} for {text[:40]!r}, but the model's embedding "
                f"has {self.vocabulary} rows; model and tokenizer do not belong together"
            )
        return ids

    @property
    def end(self) -> int | None:
        """The tokenizer's end mark."""
        found = self.tokenizer.eos_token_id
        return None if found is None else int(found)

    @property
    def pad(self) -> int:
        """The token that fills up rows: the tokenizer's padding, else its end mark, else 0."""
        found = self.tokenizer.pad_token_id
        return int(found) if found is not None else self.end if self.end is not None else 0
