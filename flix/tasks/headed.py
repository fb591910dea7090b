"""Tasks whose answer a head over an encoder gives: classification, regression, tagging of words."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flix.core.errors import listed, near
from flix.data import forms
from flix.tasks import columns as reading
from flix.tasks.columns import Row
from flix.tasks.entities import is_entities
from flix.tasks.errors import DataError
from flix.tasks.task import IGNORED, Encoded, Task


@dataclass(frozen=True)
class Headed(Task):
    """A task with a head of its own. Longer texts are cut at their end."""

    @property
    def longest(self) -> int:
        """Tokens of a row at most: what was said, or what the tokenizer says that its model reads."""
        said = getattr(self.tokenizer, "model_max_length", None) or self.max_source
        return min(self.max_source, int(said))

    def tokens(self, text: str) -> list[int]:
        """A text's ids, the model's own marks among them."""
        encoded = self.tokenizer(text, truncation=True, max_length=self.longest)
        return self.known(list(encoded["input_ids"]) or [self.pad], text)

    def number_of(self, label: str, where: str) -> int:
        """A label's place in the head.

        Raises:
            DataError: a label that the task does not have.
        """
        if label not in self._places:
            raise DataError(
                f"{where}: task {self.name!r} has no label {label!r}{near(label, self.labels)}; it has: "
                f"{listed(self.labels)}"
            )
        return self._places[label]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {label: place for place, label in enumerate(self.labels)}


@dataclass(frozen=True)
class Classification(Headed):
    """A text has one label."""

    kind = "classification"

    @property
    def metric(self) -> str:
        """Accuracy."""
        return "accuracy"

    def read(self, row: Row) -> Encoded:
        """``input_ids``, and ``labels`` with the label at the first token."""
        number = self.number_of(self._wanted(row), self.place(row))
        encoded = self.prompt(row)
        return {**encoded, "labels": [number, *[IGNORED] * (len(encoded["input_ids"]) - 1)]}

    def prompt(self, row: Row) -> Encoded:
        """``input_ids``."""
        return {"input_ids": self.tokens(self.asked(row))}

    def example(self, row: Row) -> tuple[str, str | None]:
        """The text and its label."""
        return _source_of(self, row), self._wanted(row) if self.answered(row) else None

    def _wanted(self, row: Row) -> str:
        (label,) = labels_of(self.kind, row, self.columns, self.place(row))
        return label


@dataclass(frozen=True)
class Regression(Headed):
    """A text has a number."""

    kind = "regression"

    @property
    def metric(self) -> str:
        """Pearson's correlation."""
        return "pearson"

    def read(self, row: Row) -> Encoded:
        """``input_ids`` and ``value``."""
        return {**self.prompt(row), "value": self.value(row)}

    def prompt(self, row: Row) -> Encoded:
        """``input_ids``."""
        return {"input_ids": self.tokens(self.asked(row))}

    def example(self, row: Row) -> tuple[str, str | None]:
        """The text and its number."""
        return _source_of(self, row), f"{self.value(row):g}" if self.answered(row) else None

    def value(self, row: Row) -> float:
        """The number."""
        column, where = self.columns["target"], self.place(row)
        return forms.number(reading.value_of(row, column, where), column, where)


@dataclass(frozen=True)
class Tagging(Headed):
    """Every word of a text has a tag, which is learned and read at the word's first piece.

    Words beyond the longest length, and words of which the tokenizer makes nothing, are lost: they get no tag.
    """

    kind = "tagging"

    @property
    def metric(self) -> str:
        """F1 of entities, if the tags are of entities (``B-...``, ``I-...``, ``O``); else accuracy."""
        return "entity_f1" if is_entities(self.labels) else "accuracy"

    @property
    def answer_column(self) -> str:
        """The tags."""
        return self.columns["tags"]

    def read(self, row: Row) -> Encoded:
        """``input_ids``, and ``labels`` at each word's first piece."""
        where = self.place(row)
        tags = self.tags(row)
        encoded = self.prompt(row)
        labels = [IGNORED] * len(encoded["input_ids"])
        numbers = [self.number_of(tag, where) for tag in tags]
        for number, first in zip(numbers, encoded["first"], strict=True):
            if first is not None:
                labels[first] = number
        return {"input_ids": encoded["input_ids"], "labels": labels}

    def prompt(self, row: Row) -> Encoded:
        """``input_ids``, and ``first``: where each word begins, None for words that are lost."""
        words = self.words(row)
        if not words:
            return {"input_ids": self.tokens(""), "first": []}
        apart = [f" {word}" if self._spaced and place else word for place, word in enumerate(words)]
        encoded = self.tokenizer(
            apart, is_split_into_words=True, truncation=True, max_length=self.longest
        )
        first: list[int | None] = [None] * len(words)
        for place, word in reversed([*enumerate(encoded.word_ids())]):
            if word is not None:
                first[word] = place
        ids = self.known(list(encoded["input_ids"]) or [self.pad], " ".join(words))
        return {"input_ids": ids, "first": first}

    def example(self, row: Row) -> tuple[str, str | None]:
        """The words and their tags, each joined by blanks."""
        wanted = " ".join(self.tags(row)) if self.answered(row) else None
        return " ".join(self.words(row)), wanted

    @cached_property
    def _spaced(self) -> bool:
        """Whether the tokenizer takes words without blanks for parts of one word, as byte-level ones do."""

        def read(text: str | list[str]) -> list[int]:
            split = isinstance(text, list)
            ids = self.tokenizer(text, is_split_into_words=split, add_special_tokens=False)
            return list(ids["input_ids"])

        whole = read("a b")
        return read(["a", "b"]) != whole and read(["a", " b"]) == whole

    def words(self, row: Row) -> list[str]:
        """The words."""
        column, where = self.columns["tokens"], self.place(row)
        return forms.texts(reading.value_of(row, column, where), column, where)

    def tags(self, row: Row) -> list[str]:
        """The tags, one a word."""
        where = self.place(row)
        tags, words = labels_of(self.kind, row, self.columns, where), self.words(row)
        if len(tags) != len(words):
            raise DataError(
                f"{where}: {len(words)} words in {self.columns['tokens']!r} and {len(tags)} tags in "
                f"{self.columns['tags']!r}; each word has one tag"
            )
        return tags


def labels_of(kind: str, row: Row, columns: Any, where: str) -> list[str]:
    """The labels that a row of classification or tagging names."""
    if kind == "tagging":
        column = columns["tags"]
        return forms.texts(reading.value_of(row, column, where), column, where)
    column = columns["target"]
    value = reading.value_of(row, column, where)
    if isinstance(value, bool):
        return [str(value).lower()]
    return [forms.text(value, column, where)]


def _source_of(task: Headed, row: Row) -> str:
    has = row.get(task.columns["source"]) is not None
    return task.text(row, "source") if has else task.asked(row)
