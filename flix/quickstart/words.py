"""Word lists of many languages, from installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from flix.core.garbage import uncollected

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Languages that wordfreq lacks. Their words are forms from simplemma's dictionaries.
FORMS_ONLY = frozenset({"cy", "ka", "sw"})


@lru_cache(maxsize=1)
@uncollected
def lemma_dictionary(language: str) -> Mapping[str, str]:
    """simplemma's dictionary from forms to lemmas, indexed for lookups and not expanded.

    Only the last one asked for is kept: the larger ones take 100 MB.
    """
    from simplemma.strategies.dictionaries import StreamDictionaryFactory

    return StreamDictionaryFactory(cache_max_size=1).get_dictionary(language)


def is_word(text: str, shortest: int = 2, longest: int = 20) -> bool:
    """Whether the text is letters only, of a usual length."""
    return shortest <= len(text) <= longest and text.isalpha()


def frequent_words(language: str, count: int) -> list[str]:
    """The most frequent words of a language in wordfreq, the most frequent first."""
    import wordfreq

    return [word for word in wordfreq.top_n_list(language, count) if is_word(word)]


def _records(language: str, stop: int, step: int) -> Iterator[tuple[str, str]]:
    """Every ``step``-th of a lemma dictionary's first ``stop`` entries."""
    try:
        from simplemma.strategies.dictionaries import frontcode
        from simplemma.strategies.dictionaries.dictionary_factory import _read_decompressed

        data = _read_decompressed(language)
        backwards, _, start = frontcode._read_header(data)
        way = -1 if backwards else 1
        for _, form, lemma in islice(frontcode._iter_records(data, start), 0, stop, step):
            yield form[::way].decode(), lemma[::way].decode()
    except (ImportError, AttributeError):  # another layout of simplemma's: its slower public way
        yield from islice(lemma_dictionary(language).items(), 0, stop, step)


@lru_cache(maxsize=4)
@uncollected
def dictionary_sample(language: str, count: int) -> list[tuple[str, str]]:
    """Up to ``count`` forms and lemmas spread over the first 400,000 dictionary entries.

    Reading stops there because the largest dictionary, Swahili, has ten times as many.
    """
    step = max(1, 400_000 // (2 * count))
    pairs = [
        (form, lemma)
        for form, lemma in _records(language, 400_000, step)
        if is_word(form, 3, 16) and form == form.lower()
    ]
    return pairs[:: max(1, len(pairs) // count)][:count]


def words(language: str, count: int) -> list[str]:
    """Words of a language, from whichever list has it."""
    if language in FORMS_ONLY:
        return [form for form, _ in dictionary_sample(language, count)]
    return frequent_words(language, count)
