"""Unlabelled text as a task: some characters of a line are spoilt, and the model writes the line as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from flix.study.words.types import Pair

MOST_WORDS = 3
#: The share of a line's characters that are spoilt is between these, and at least one character is.
LEAST_SPOILT, MOST_SPOILT = 0.08, 0.3


def spoil(line: str, draw: random.Random) -> str:
    """A spoilt copy: characters are lost, doubled, swapped with the next, hidden behind ``_``, or replaced.

    The copy always differs from the line, unless the line has one character.
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
    """Lines of one to three words, each spoilt and whole. They never end, unless there are no words.

    Only ``draw.random()`` is used, because it gives the same numbers in every version of Python.
    """
    while words:
        count = 1 + int(draw.random() * MOST_WORDS)
        line = " ".join(words[int(draw.random() * len(words))] for _ in range(count))
        yield Pair(spoil(line, draw), line)
