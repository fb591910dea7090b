"""What the base is pretrained on: lines of the unlabelled words, spoilt anew, and rows as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flix.study.words import Pair
from tools.noise import LineSampler, denoising_pair
from tools.pretrain import BUFFERED, Batches, curriculum
from tools.tokens import BYTE_OFFSET, EOS

AS_IT_IS = 0.2
"""The share of pairs that are rows with their own spoilt source; of the others, only the words come from the rows."""


@dataclass(frozen=True)
class Blocks:
    """The batches of a whole pretraining, in blocks of :data:`tools.pretrain.BUFFERED`, for torch's ``DataLoader``.

    A block depends on the seed and its number alone, so that any number of processes makes the same batches.

    Args:
        words: by language.
        rows: by language.
        seed: draws everything.
        steps: how many batches are planned; the first lines are short ones.
        batch: pairs in a batch.
    """

    words: dict[str, list[str]]
    rows: dict[str, tuple[Pair, ...]]
    seed: int
    steps: int
    batch: int

    def __len__(self) -> int:
        return -(-self.steps // BUFFERED)

    def __getitem__(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Source ids and labels of a block's batches, in 16 bits."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        rng = np.random.default_rng([self.seed, number])
        shares = {language: len(words) ** 0.5 for language, words in self.words.items()}
        sampler = LineSampler(self.words, shares, rng, head=1)
        curriculum(sampler, number * BUFFERED / self.steps)
        rows = [row for some in self.rows.values() for row in some]

        def draw() -> tuple[list[int], list[int]]:
            if rng.random() >= AS_IT_IS:
                return denoising_pair(sampler.line(), rng)
            source, target = rows[int(rng.integers(len(rows)))]
            return ids_of(source), ids_of(target)

        made = Batches(draw, self.batch, rng).block()
        return [(source.astype(np.int16), labels.astype(np.int16)) for source, labels in made]


def ids_of(text: str) -> list[int]:
    """A text's ids, with the end."""
    return [*(byte + BYTE_OFFSET for byte in text.encode()), EOS]


def as_it_is(block: Sequence[tuple[np.ndarray, np.ndarray]]) -> Sequence[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """A block, which is no row to be collated."""
    return block
