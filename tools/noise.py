"""Denoising examples for the base: lines of a few words, spoilt in one of several ways.

Two kinds of target. *Span corruption*, as T5 does it: spans are replaced by sentinels in the source
and the target lists what was taken out. *Repair*: the source is a spoilt line (letters lost,
swapped, doubled or masked, accents, capitals or spaces dropped) and the target is the whole line.
Some lines open with a made-up tag and a colon, kept out of the target: prompts later look so.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from tools.tokens import BYTE_OFFSET, EOS, FIRST_SENTINEL

MAX_LINE_BYTES = 60
_TAG_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class LineSampler:
    """Lines of one to five words of one language, frequent words more often, plus some numbers.

    Args:
        lists: the words of each language, by frequency.
        shares: how often a language is drawn, where it is not 1.
        rng: draws everything.
        head: 1 draws all words of a language equally often; more favours the head of its list.
    """

    def __init__(
        self,
        lists: dict[str, list[str]],
        shares: dict[str, float],
        rng: np.random.Generator,
        head: float = 2,
    ) -> None:
        self._rng, self._head = rng, head
        self._languages = list(lists)
        share = np.array([shares.get(language, 1.0) for language in self._languages])
        self._probabilities = share / share.sum()
        self._lists = [lists[language] for language in self._languages]
        #: Most words on a line, and the share of words with their letters in a random order: what
        #: cannot be guessed must be copied. Both may be changed between lines.
        self.most_words = 5
        self.jumbled = 0.0

    def _word(self, words: Sequence[str]) -> str:
        roll = self._rng.random()
        if roll < 0.05:
            return str(self._rng.integers(0, 10 ** int(self._rng.integers(1, 6))))
        if roll < 0.08:
            year, month, day = self._rng.integers((1900, 1, 1), (2100, 13, 29))
            return f"{year}-{month:02d}-{day:02d}"
        # a power of a uniform draw favours the head of the list
        word = words[int(self._rng.random() ** self._head * len(words))]
        if self._rng.random() < self.jumbled:
            word = "".join(word[k] for k in self._rng.permutation(len(word)))
        roll = self._rng.random()
        if roll < 0.15:
            return word.capitalize()
        if roll < 0.19:
            return word + ","
        if roll < 0.22:
            return word + "-" + words[int(self._rng.random() * len(words))]
        return word

    def line(self) -> str:
        """One line, of at most :data:`MAX_LINE_BYTES` bytes unless a single word has more."""
        words = self._lists[int(self._rng.choice(len(self._lists), p=self._probabilities))]
        count = int(self._rng.integers(1, self.most_words + 1))
        line = self._word(words)
        for _ in range(count - 1):
            longer = f"{line} {self._word(words)}"
            if len(longer.encode()) > MAX_LINE_BYTES:
                break
            line = longer
        return line


def _plain(text: str) -> str:
    parts = unicodedata.normalize("NFD", text)
    return "".join(letter for letter in parts if not unicodedata.combining(letter))


def spoil(line: str, rng: np.random.Generator) -> str:
    """A spoilt copy of a line, never longer than the line by more than a few letters."""
    roll = rng.random()
    if roll < 0.08:
        return line.replace(" ", "")
    if roll < 0.14:
        return _plain(line)
    if roll < 0.18:
        return line.upper()
    if roll < 0.3:
        return line
    rate = 0.05 + 0.2 * rng.random()
    letters = list(line)
    out: list[str] = []
    draws = rng.random(len(letters))
    kinds = rng.integers(0, 5, len(letters))
    index = 0
    while index < len(letters):
        letter = letters[index]
        if draws[index] >= rate:
            out.append(letter)
        elif kinds[index] == 0:  # lost
            pass
        elif kinds[index] == 1 and index + 1 < len(letters):  # swapped
            out += [letters[index + 1], letter]
            index += 1
        elif kinds[index] == 2:  # doubled
            out += [letter, letter]
        elif kinds[index] == 3:  # replaced by another letter of the line
            out.append(letters[int(rng.integers(len(letters)))])
        else:  # masked
            out.append("_")
        index += 1
    return "".join(out) or line


def corrupt_spans(line: str, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """T5's span corruption over bytes: ids of the source and of the target."""
    ids = [byte + BYTE_OFFSET for byte in line.encode()]
    mean = 6.0 if rng.random() < 0.7 else 14.0
    spans = max(1, round(0.3 * len(ids) / mean))
    starts = sorted(set(map(int, rng.integers(0, len(ids), spans))))
    source: list[int] = []
    target: list[int] = []
    done = 0
    for number, start in enumerate(starts):
        start = max(start, done)
        stop = min(len(ids), start + 1 + int(rng.poisson(mean - 1)))
        if start >= stop:
            continue
        source += [*ids[done:start], FIRST_SENTINEL + number]
        target += [FIRST_SENTINEL + number, *ids[start:stop]]
        done = stop
    return [*source, *ids[done:], EOS], [*target, EOS]


def denoising_pair(
    line: str, rng: np.random.Generator, span_share: float = 0.35
) -> tuple[list[int], list[int]]:
    """Ids of a source and of its target, made from one line."""
    tag: list[int] = []
    if rng.random() < 0.5:
        letters = rng.integers(0, 26, int(rng.integers(2, 7)))
        text = "".join(_TAG_LETTERS[k] for k in letters) + ": "
        tag = [byte + BYTE_OFFSET for byte in text.encode()]
    if rng.random() < span_share:
        source, target = corrupt_spans(line, rng)
    else:
        source = [*(byte + BYTE_OFFSET for byte in spoil(line, rng).encode()), EOS]
        target = [*(byte + BYTE_OFFSET for byte in line.encode()), EOS]
    return tag + source, target
