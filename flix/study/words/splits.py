"""Which split a row belongs to. No word and no lemma of a language is in two splits, in whatever tasks.

Every word has a *key*: its casefolded form, in most scripts without combining marks. Each key is in exactly one split:
the one that a shared task put it in, or otherwise one that the seed draws. A row's keys are those of its words, and of
the lemmas that these are known forms of. A row is used only if all of its keys are in the same split.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from flix.study.words.design import DEV_SHARE, TEST_SHARE, unit
from flix.study.words.types import SPLITS, Split

# In other scripts, combining marks are vowels, tones and voicing. Without them, a word would be another word.
_MARKS_ASIDE = frozenset({"Arab", "Cyrl", "Grek", "Hebr", "Latn"})

Claim = tuple[str, Split]
"""(a word, the split into which a source puts it)."""


def plain(text: str) -> str:
    """A text without combining marks, in NFC: ``"été"`` is ``"ete"``."""
    if text.isascii():
        return text
    parts = unicodedata.normalize("NFD", text)
    kept = "".join(sign for sign in parts if unicodedata.category(sign) != "Mn")
    return unicodedata.normalize("NFC", kept)


@lru_cache(maxsize=1 << 17)
def key_of(word: str, script: str) -> str:
    """The key of a word. Words with the same key are always in the same split of their language."""
    return unicodedata.normalize(
        "NFC", (plain(word) if script in _MARKS_ASIDE else word).casefold()
    )


@dataclass(frozen=True)
class Splits:
    """The splits of one language's words.

    Attributes:
        language, script: the language.
        seed: draws the split of keys that no source puts in one.
        claimed: the split of each key that a source puts in one.
        lemmas: for each key, the keys of the lemmas of which it is a known form.
    """

    language: str
    script: str
    seed: int
    claimed: dict[str, Split] = field(default_factory=dict)
    lemmas: dict[str, set[str]] = field(default_factory=dict)

    def keys(self, words: Iterable[str]) -> set[str]:
        """The keys of words and of their lemmas."""
        found = {key_of(word, self.script) for word in words}
        return found.union(*(self.lemmas.get(key, ()) for key in found))

    def split_of(self, keys: Iterable[str], official: Split | None = None) -> Split | None:
        """The split of a row with these keys; None if they are in several.

        Args:
            keys: from :meth:`keys`.
            official: the split in which the row's shared task has it.
        """
        found = {self.claimed.get(key) or self._drawn(key) for key in keys}
        if official is not None:
            found.add(official)
        return found.pop() if len(found) == 1 else None

    def _drawn(self, key: str) -> Split:
        u = unit(self.seed, "split", self.language, key)
        return "dev" if u < DEV_SHARE else "test" if u < DEV_SHARE + TEST_SHARE else "train"


def make_splits(
    language: str,
    script: str,
    seed: int,
    inflected: Sequence[tuple[str, str, Split]],
    others: Iterable[Iterable[Claim]] = (),
) -> Splits:
    """The splits of a language's words.

    Args:
        language: ISO 639-3; it changes what is drawn.
        script: ISO 15924.
        seed: of the draws.
        inflected: lemmas, forms, and the split of their shared task. A form is in the split of its lemma. If it has
            lemmas in several splits, the last of train, dev and test counts, so that test sets stay whole.
        others: what other sources claim. Earlier sources count more. Within a source, the last of train, dev and test
            counts.
    """
    splits = Splits(language, script, seed)
    claims: list[Claim] = []
    for lemma, form, split in inflected:
        of_lemma, of_form = key_of(lemma, script), key_of(form, script)
        claims += [(of_lemma, split), (of_form, split)]
        if of_form != of_lemma:
            splits.lemmas.setdefault(of_form, set()).add(of_lemma)
    _settle(splits.claimed, claims)
    for source in others:
        _settle(splits.claimed, ((key_of(word, script), split) for word, split in source))
    return splits


def _settle(known: dict[str, Split], claims: Iterable[Claim]) -> None:
    """Add a source's claims for keys that no earlier source claims."""
    own: dict[str, Split] = {}
    for key, split in claims:
        if key not in known and (key not in own or SPLITS.index(split) > SPLITS.index(own[key])):
            own[key] = split
    known.update(own)
