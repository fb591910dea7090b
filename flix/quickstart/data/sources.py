"""Pairs (item, input, output) of each task, read from installed packages.

Every function returns a list in the order in which pairs should be taken, or an empty one where the
package does not know the language. The *item* is what a split must keep in one piece.
"""

from __future__ import annotations

import datetime
import random
from bisect import bisect
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar

from ..words import FORMS_ONLY, dictionary_sample, frequent_words, is_word, lemma_dictionary
from .design import DEV_ITEMS, TASKS, TEST_ITEMS, split_of, train_size

_T = TypeVar("_T")


class Pair(NamedTuple):
    """An item with one of its input and output texts."""

    item: str
    text: str
    answer: str


_HYPHENATED = {"de", "es", "fr", "ru", "cs", "hu", "lt", "id", "sv"}
_NUMBERED = {"de", "es", "fr", "ru", "cs", "hu", "fi", "tr", "lt", "id", "sv", "cy"}
_SPLITS = ("train", "dev", "test")
_WORDS_READ = 16000

_MOST_DRAWS = 40_000
#: Cumulative shares of numbers of one, two and three digits; the others have four.
_DIGIT_SHARES = (0.02, 0.17, 0.67)
_FIRST_DAY = datetime.date(1950, 1, 1).toordinal()
_DAYS = 36525


def _random(seed: int, *parts: str) -> random.Random:
    """A generator of its own for each cell; ``random()`` is the same on every Python."""
    return random.Random("/".join((str(seed), *parts)))


def _shuffled(rng: random.Random, items: list[_T]) -> list[_T]:
    keyed = [(rng.random(), index) for index in range(len(items))]
    return [items[index] for _, index in sorted(keyed)]


def lemma_pairs(language: str, seed: int) -> list[Pair]:
    """Inflected forms and their lemmas; the item is the lemma."""
    if language in FORMS_ONLY:
        found = [Pair(lemma, form, lemma) for form, lemma in dictionary_sample(language, 2000)]
        found = [pair for pair in found if is_word(pair.answer)]
        return _shuffled(_random(seed, "lemma", language), found)
    dictionary = lemma_dictionary(language)
    candidates = [word for word in frequent_words(language, _WORDS_READ) if len(word) >= 3]
    candidates = _shuffled(_random(seed, "lemma", language), candidates)
    missing = sum(_wanted(language, "lemma", seed, split) for split in _SPLITS)
    pairs = []
    for word in candidates:
        form, lemma = word, dictionary.get(word)
        if lemma is None:  # German nouns are listed with their capital
            form = word.capitalize()
            lemma = dictionary.get(form)
        if lemma is not None and is_word(lemma):
            pairs.append(Pair(lemma, form, lemma))
            missing -= lemma != form
        if missing <= 0:
            break
    return pairs


def hyphen_pairs(language: str, seed: int) -> list[Pair]:
    """Words and the same words with their hyphenation points; the item is the word."""
    if language not in _HYPHENATED:
        return []
    import pyphen

    dictionary = pyphen.Pyphen(lang=language)
    kept = [word for word in frequent_words(language, _WORDS_READ) if len(word) >= 5]
    kept = _shuffled(_random(seed, "hyphen", language), kept)
    needed = sum(_wanted(language, "hyphen", seed, split) for split in _SPLITS)
    return [Pair(word, word, dictionary.inserted(word)) for word in kept[: needed + 300]]


def _wanted(language: str, task: str, seed: int, split: str) -> int:
    """A few more items than a split of a cell takes: some are too long or are copies."""
    sizes = {"dev": DEV_ITEMS, "test": TEST_ITEMS, "train": train_size(seed, language, task)}
    return sizes[split] * 5 // 4 + 20


@lru_cache(maxsize=1 << 16)
def _split(seed: int, family: str, item: str) -> str:
    return split_of(seed, family, item)


def _draw(language: str, task: str, seed: int, draw: Callable[[random.Random], str]) -> list[str]:
    """Items drawn without repetition until every split of the cell has enough of them."""
    family = TASKS[task].family
    missing = {split: _wanted(language, task, seed, split) for split in _SPLITS}
    rng = _random(seed, task, language)
    chosen: dict[str, None] = {}
    for _ in range(_MOST_DRAWS):
        item = draw(rng)
        split = _split(seed, family, item)
        if item not in chosen and missing[split] > 0:
            chosen[item] = None
            missing[split] -= 1
            if not any(missing.values()):
                break
    return list(chosen)


def _draw_number(rng: random.Random) -> str:
    digits = 1 + bisect(_DIGIT_SHARES, rng.random())
    smallest = 10 ** (digits - 1) if digits > 1 else 0
    return str(smallest + int(rng.random() * (10**digits - smallest)))


def _draw_day(rng: random.Random) -> str:
    return datetime.date.fromordinal(_FIRST_DAY + int(_DAYS * rng.random())).isoformat()


def number_pairs(language: str, seed: int, task: str) -> list[Pair]:
    """Numbers in words to digits or to English words; the item is the number."""
    if language not in _NUMBERED:
        return []
    from num2words import num2words

    pairs = []
    for item in _draw(language, task, seed, _draw_number):
        number = int(item)
        text = " ".join(num2words(number, lang=language).split())
        answer = item if task == "num2dig" else num2words(number, lang="en")
        pairs.append(Pair(item, text, answer))
    return pairs


def date_pairs(language: str, seed: int, task: str) -> list[Pair]:
    """Localised dates, two in five with a weekday, to ISO or to English; the item is the day."""
    from babel.dates import format_date

    rng = _random(seed, task, language, "style")
    pairs = []
    for item in _draw(language, task, seed, _draw_day):
        day = datetime.date.fromisoformat(item)
        style = "full" if rng.random() < 0.4 else "long"
        text = format_date(day, style, locale=language)
        answer = item if task == "date2iso" else format_date(day, style, locale="en")
        pairs.append(Pair(item, " ".join(text.split()), answer))
    return pairs


def name_pairs(language: str, seed: int) -> list[Pair]:
    """Names of countries, languages and currencies to English; the item is the name as written."""
    from babel import Locale

    local, english = Locale.parse(language), Locale.parse("en")
    answers: dict[str, set[str]] = {}
    for kind in ("territories", "languages", "currencies"):
        names, translations = getattr(local, kind), getattr(english, kind)
        for code in sorted(set(names) & set(translations)):
            answers.setdefault(names[code], set()).add(translations[code])
    pairs = [
        Pair(name, name, next(iter(found)))
        for name, found in answers.items()
        if len(found) == 1 and len(name) > 2
    ]
    return _shuffled(_random(seed, "name", language), pairs)


def pairs_of(language: str, task: str, seed: int) -> list[Pair]:
    """The pairs of one cell before splitting."""
    if task == "lemma":
        return lemma_pairs(language, seed)
    if task == "hyphen":
        return hyphen_pairs(language, seed)
    if task in ("num2dig", "num2en"):
        return number_pairs(language, seed, task)
    if task in ("date2iso", "date2en"):
        return date_pairs(language, seed, task)
    if task == "name2en":
        return name_pairs(language, seed)
    raise KeyError(task)
