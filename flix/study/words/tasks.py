"""The rows of each task, from what the repositories have in a language."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flix.study.words.splits import plain
from flix.study.words.types import Pair, Split

JOIN = "|"
"""Stands between the morphs of a target."""

Inflected = tuple[str, str, str, Split]
Segmented = tuple[str, tuple[str, ...], "Split | None"]


class Row(NamedTuple):
    """A pair, the words that decide its split, and the split in which its shared task has it, if there is one."""

    source: str
    target: str
    words: tuple[str, ...]
    official: Split | None = None

    @property
    def pair(self) -> Pair:
        """The pair alone."""
        return Pair(self.source, self.target)


@dataclass(frozen=True)
class Texts:
    """What the repositories have in one language.

    Attributes:
        inflected: (lemma, tags, form, split).
        segmented: (word, morphs, split); the split is None if the shared task's is not kept.
        spoken: (word, pronunciation).
        spoken_test: words of the pronunciation task's test set. Their pronunciations are in no training row.
    """

    inflected: Sequence[Inflected] = ()
    segmented: Sequence[Segmented] = ()
    spoken: Sequence[tuple[str, str]] = ()
    spoken_test: frozenset[str] = frozenset()

    def words(self) -> Iterator[str]:
        """Every entry that is a single word, in no particular order and with repetitions."""
        for lemma, _, form, _ in self.inflected:
            yield from (word for word in (lemma, form) if _single(word))
        for word, _, _ in self.segmented:
            yield from ((word,) if _single(word) else ())
        for word, _ in self.spoken:
            yield from ((word,) if _single(word) else ())


def inflect_row(lemma: str, tags: str, form: str, split: Split | None) -> Row:
    """From ``lemma tags`` to the form."""
    return Row(f"{lemma} {tags}", form, (lemma, form), split)


def segment_row(word: str, morphs: Sequence[str], split: Split | None) -> Row:
    """From a word to its morphs."""
    return Row(word, JOIN.join(morphs), (word,), split)


def pronounce_row(word: str, sounds: str, split: Split | None = None) -> Row:
    """From a word to its pronunciation."""
    return Row(word, sounds, (word,), split)


def rows_of(task: str, texts: Texts, *, accents: bool) -> list[Row]:
    """The rows of a task, in no particular order. Sources with several targets are left out.

    Args:
        task: one of :data:`.design.TASKS`, except ``denoise``.
        texts: of the language.
        accents: whether its words carry marks that are worth restoring.
    """
    if task == "accent" and not accents:
        return []
    return _unambiguous(_ROWS[task](texts))


def _inflect(texts: Texts) -> Iterator[Row]:
    for lemma, tags, form, split in texts.inflected:
        yield inflect_row(lemma, tags, form, split)


def _lemma(texts: Texts) -> Iterator[Row]:
    for lemma, _, form, split in texts.inflected:
        yield Row(form, lemma, (lemma, form), split)


def _tags(texts: Texts) -> Iterator[Row]:
    for lemma, tags, form, split in texts.inflected:
        yield Row(f"{form} < {lemma}", tags, (lemma, form), split)


def _segment(texts: Texts) -> Iterator[Row]:
    for word, morphs, split in texts.segmented:
        if _single(word) and all(morphs) and not any(JOIN in m or "@@" in m for m in morphs):
            yield segment_row(word, morphs, split)


def _spoken(texts: Texts) -> Iterator[tuple[str, str, Split | None]]:
    """Single words of at least two letters that have exactly one pronunciation, and the split of the shared task."""
    ways: dict[str, set[str]] = defaultdict(set)
    for word, sounds in texts.spoken:
        ways[word].add(sounds)
    for word, found in ways.items():
        if len(found) == 1 and len(word) > 1 and _single(word):
            yield word, next(iter(found)), "test" if word in texts.spoken_test else None


def _pronounce(texts: Texts) -> Iterator[Row]:
    for word, sounds, split in _spoken(texts):
        yield pronounce_row(word, sounds, split)


def _spell(texts: Texts) -> Iterator[Row]:
    for word, sounds, split in _spoken(texts):
        yield Row(sounds, word, (word,), split)


def _accents(texts: Texts) -> Iterator[Row]:
    for word in dict.fromkeys(texts.words()):
        if len(word) > 1 and plain(word):
            yield Row(plain(word), word, (word,))


def _single(word: str) -> bool:
    return len(word.split(None, 1)) == 1


def _unambiguous(rows: Iterator[Row]) -> list[Row]:
    """Each source once; those with several targets are left out."""
    found: dict[str, Row] = {}
    several: set[str] = set()
    for row in rows:
        if found.setdefault(row.source, row).target != row.target:
            several.add(row.source)
    return [row for source, row in found.items() if source not in several]


_ROWS: dict[str, Callable[[Texts], Iterator[Row]]] = {
    "inflect": _inflect,
    "lemma": _lemma,
    "tags": _tags,
    "segment": _segment,
    "pron": _pronounce,
    "spell": _spell,
    "accent": _accents,
}
