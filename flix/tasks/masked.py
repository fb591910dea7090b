"""Masked language modelling: text of a language, without labels, as one more task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core import rng
from flix.tasks.columns import Row
from flix.tasks.headed import Headed
from flix.tasks.task import IGNORED, Encoded

# As BERT's: of 15 percent of a text's tokens, 8 of 10 become the mask, 1 becomes another token, 1 stays.
_RATE, _MASK, _OTHER = 0.15, 0.8, 0.9


@dataclass(frozen=True)
class Masked(Headed):
    """Some tokens of a text are masked, and said again by the base's own head."""

    kind = "masked"

    @property
    def metric(self) -> str:
        """The part of the masked tokens that are said rightly."""
        return "accuracy"

    def answered(self, row: Row) -> bool:
        """A text is its own answer."""
        return True

    def read(self, row: Row) -> Encoded:
        """``input_ids`` without masks, and ``maskable``: which of them are no marks of the model's own."""
        asked = self.asked(row)
        encoded = self.tokenizer(
            asked, truncation=True, max_length=self.longest, return_special_tokens_mask=True
        )
        ids = self.known(list(encoded["input_ids"]), asked)
        maskable = [not mark for mark in encoded["special_tokens_mask"]]
        return {"input_ids": ids or [self.pad], "maskable": maskable or [False]}

    def prompt(self, row: Row) -> Encoded:
        """The same: what is asked for is taken out of the text when it is masked."""
        return self.read(row)

    def example(self, row: Row) -> tuple[str, str | None]:
        """The text; what is masked of it is known only then."""
        return self.asked(row), ""

    def masked(self, encoded: Encoded, key: tuple[int | str, ...]) -> Encoded:
        """``input_ids`` with masks, and ``labels`` where there are some: a function of the key.

        Args:
            encoded: what :meth:`read` gives.
            key: the seed, and the row's number in the run; or what a text is masked by outside training.
        """
        ids = np.array(encoded["input_ids"], np.int64)
        able = np.array(encoded["maskable"], bool)
        labels = np.full(len(ids), IGNORED, np.int64)
        if able.any():
            draws = self._draws(len(ids), key)
            chance = np.where(able, draws[0], 2.0)
            first = chance.argsort(kind="stable")[: most_masked(len(ids))]
            chosen = np.zeros(len(ids), bool)
            chosen[first] = chance[first] < _RATE
            chosen[first[0]] = True  # of a short text, one
            labels[chosen] = ids[chosen]
            ids[chosen & (draws[1] < _MASK)] = int(self.tokenizer.mask_token_id)
            other = chosen & (draws[1] >= _MASK) & (draws[1] < _OTHER)
            ids[other] = (draws[2][other] * self._size).astype(np.int64)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}

    @staticmethod
    def _draws(length: int, key: tuple[int | str, ...]) -> NDArray[np.float64]:
        return rng.uniform(rng.key("masking", *key), np.arange(3)[:, None], np.arange(length))

    @property
    def _size(self) -> int:
        size = len(self.tokenizer)
        return size if self.vocabulary is None else min(size, self.vocabulary)


def most_masked(length: int) -> int:
    """How many tokens of a text may be masked, which it happens to none but short ones to reach."""
    return length // 4 + 1


def own_key(encoded: Encoded) -> tuple[Any, ...]:
    """What a text is masked by outside training: itself, so that it is masked alike in every batch and every run."""
    return ("text", ",".join(map(str, encoded["input_ids"])))
