"""Which split a row belongs to, so that no word and no lemma is in two splits of a language, whatever the tasks.

Every word has a *key*: its casefolded form, in most scripts without combining marks. A key is in one split alone: the
one that a shared task put it in, or else one drawn by the seed. A row's keys are those of all its words and of the
lemmas that these are known to be forms of. A row whose keys are not all in one split is in none.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from flix.study.words.design import DEV_SHARE, TEST_SHARE, unit
from flix.study.words.types import SPLITS, Split

# Elsewhere, combining marks are vowels, tones and voicing, and words without them would be other words.
_MARKS_ASIDE = frozenset({"Arab", "Cyrl", "Grek", "Hebr", "Latn"})

Claim = tuple[str, Split]
"""(a word, the split that a source puts it in)."""


def plain(text: str) -> str:
    """A text without combining marks, in NFC: ``"été"`` is ``"ete"``."""
    if text.isascii():
        return text
    parts = unicodedata.normalize("NFD", text)
    kept = "".join(sign for sign in parts if unicodedata.category(sign) != "Mn")
    return unicodedata.normalize("NFC", kept)


@lru_cache(maxsize=1 << 17)
def key_of(word: str, script: str) -> str:
    """The key of a word; words of one key are never in two splits of their language."""
    return unicodedata.normalize(
        "NFC", (plain(word) if script in _MARKS_ASIDE else word).casefold()
    )


@dataclass(frozen=True)
class Splits:
    """The splits of one language's words.

    Attributes:
        language, script, seed: of the language; the seed draws the splits of what nothing is said of.
        claimed: the split of each key that a source says something of.
        lemmas: the keys of the lemmas that a key is known to be a form of.
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
        """The split of a row of these keys, None if they are not all in one.

        Args:
            keys: as :meth:`keys` gives them.
            official: the split that its shared task has the row in.
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
        language: for what is drawn.
        script: ISO 15924.
        seed: of what is drawn.
        inflected: lemmas, forms and the split of their shared task. A form is where its lemma is; if lemmas of several
            splits have it, it is where the last of train, dev and test is, so that test sets stay whole.
        others: what other sources claim, the first source's word counting most; within a source, the last of train,
            dev and test.
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
    """Add a source's claims for keys that no source before it claims."""
    own: dict[str, Split] = {}
    for key, split in claims:
        if key not in known and (key not in own or SPLITS.index(split) > SPLITS.index(own[key])):
            own[key] = split
    known.update(own)
