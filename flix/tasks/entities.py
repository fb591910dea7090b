"""Entities in tags, as ``seqeval`` finds them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from flix.tasks.errors import missing_extra

_TAG = re.compile(r"O|[BIESLU]-.+")


def is_entities(tags: Collection[str]) -> bool:
    """Whether tags are those of entities: ``O``, ``B-...``, ``I-...``, and ``E-``, ``S-``, ``L-``, ``U-`` elsewhere."""
    return all(_TAG.fullmatch(tag) for tag in tags)


def finder() -> Callable[[list[str]], list[tuple[str, int, int]]]:
    """What finds the entities in tags.

    Raises:
        MissingFrameworkError: ``seqeval`` is not installed.
    """
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError as error:
        raise missing_extra("F1 of entities", "train", error) from None
    found: Callable[[list[str]], list[tuple[str, int, int]]] = get_entities
    return found


def counted(wanted: Sequence[str], said: Sequence[str | None]) -> tuple[int, int, int]:
    """A row's entities: those that are right, those that are said, those that are wanted; a lost word is of none.

    Raises:
        MissingFrameworkError: ``seqeval`` is not installed.
    """
    entities = finder()
    gold, guess = set(entities([*wanted])), set(entities([tag or "O" for tag in said]))
    return len(gold & guess), len(guess), len(gold)
