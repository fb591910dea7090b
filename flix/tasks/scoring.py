"""Scores of answers, in percent where they are parts of a whole, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flix.core import rng
from flix.tasks.answer import Answer
from flix.tasks.errors import DataError, missing_extra

_DRAWS = 1000  # bootstrap samples
_TAIL = 2.5  # percent


def scores(kind: str, found: Sequence[Answer]) -> dict[str, float]:
    """The scores of one cell's answers, the main one first; see ``docs/tasks.md`` for each kind's.

    Args:
        kind: the task's.
        found: answers of rows that say what was wanted.

    Raises:
        DataError: no answers, or one whose row does not say what was wanted.
    """
    _check(found)
    return {"exact_match": _mean([bool(a.right) for a in found]), "chrf": _chrf(found)}


def interval(kind: str, found: Sequence[Answer], seed: int = 0) -> tuple[float, float]:
    """Where the main score lies with 95 percent, by a bootstrap over rows: of 1,000 draws of as many rows.

    Args:
        kind: the task's.
        found: the answers that the score is of.
        seed: of the draws.

    Raises:
        DataError: as for :func:`scores`.
    """
    _check(found)
    right = np.array([bool(a.right) for a in found], np.float64)
    values = 100.0 * right[_drawn(len(found), seed)].mean(1)
    low, high = np.percentile(values, [_TAIL, 100.0 - _TAIL])
    return round(float(low), 2), round(float(high), 2)


def _check(found: Sequence[Answer]) -> None:
    if not found:
        raise DataError("no answers to score")
    for number, answer in enumerate(found):
        if answer.target is None:
            raise DataError(
                f"answer {number} cannot be scored: its row does not say what is wanted"
            )


def _drawn(rows: int, seed: int) -> NDArray[np.int64]:
    """The rows of every draw: int64 ``[draws, rows]``."""
    words = rng.key("bootstrap", seed)
    places = rng.uniform(words, np.arange(_DRAWS)[:, None], np.arange(rows))
    return (places * rows).astype(np.int64)


def _mean(values: Sequence[float | bool]) -> float:
    return round(100.0 * float(np.mean(values)), 2)


def _chrf(found: Sequence[Answer]) -> float:
    try:
        import sacrebleu
    except ImportError as error:
        raise missing_extra("chrF", "train", error) from None
    wanted = [[str(a.target).strip() for a in found]]
    return round(float(sacrebleu.corpus_chrf([a.output for a in found], wanted).score), 2)
