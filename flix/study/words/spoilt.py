"""Unlabelled text as a task: lines of a language's words with some characters spoilt, to be written as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from flix.study.words.types import Pair

MOST_WORDS = 3
#: How many of a line's characters are spoilt: between these shares, and one at least.
LEAST_SPOILT, MOST_SPOILT = 0.08, 0.3


def spoil(line: str, draw: random.Random) -> str:
    """A spoilt copy: characters lost, doubled, swapped with the next, hidden behind ``_`` or taken for another.

    Never the line itself, unless it has one character.
    """
    share = LEAST_SPOILT + (MOST_SPOILT - LEAST_SPOILT) * draw.random()
    signs = list(line)
    for _ in range(max(1, round(share * len(line)))):
        if not signs:
            break
        place = int(draw.random() * len(signs))
        way = int(draw.random() * 5)
        if way == 0 and len(signs) > 1:
            del signs[place]
        elif way == 1:
            signs.insert(place, signs[place])
        elif way == 2 and place + 1 < len(signs):
            signs[place : place + 2] = signs[place + 1], signs[place]
        elif way == 3:
            signs[place] = signs[int(draw.random() * len(signs))]
        else:
            signs[place] = "_"
    found = "".join(signs)
    if found != line or len(line) < 2:
        return found
    place = int(draw.random() * len(line))
    return f"{line[:place]}_{line[place + 1 :]}"


def spoilt_pairs(words: Sequence[str], draw: random.Random) -> Iterator[Pair]:
    """Lines of one to three words, spoilt and whole, without end; none if there are no words.

    ``draw.random()`` alone is used: it is the same on every Python.
    """
    while words:
        count = 1 + int(draw.random() * MOST_WORDS)
        line = " ".join(words[int(draw.random() * len(words))] for _ in range(count))
        yield Pair(spoil(line, draw), line)
