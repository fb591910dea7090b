"""Scores of answers, in percent where they are parts of a whole, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core import rng
from flix.core.errors import ConfigError, listed, near
from flix.tasks.answer import Answer
from flix.tasks.entities import counted, finder
from flix.tasks.errors import DataError, missing_extra

_DRAWS = 1000  # bootstrap samples
_TAIL = 2.5  # percent

Sums = NDArray[np.float64]
Measure = Callable[[Sums], Sums]


def scores(kind: str, found: Sequence[Answer]) -> dict[str, float]:
    """The scores of one cell's answers, the main one first; ``docs/tasks.md`` says what each is.

    Args:
        kind: the task's.
        found: answers to rows that have an expected answer.

    Returns:
        The scores by name, in percent if they are parts of a whole; NaN if there is nothing to measure, such as F1
        without an entity.

    Raises:
        ConfigError: an unknown kind.
        DataError: no answers, or an answer whose row has no expected answer.
        MissingFrameworkError: a package that a score needs is not installed.
    """
    _check(kind, found)
    name, parts, measure = _main(kind, found)
    main = {name: round(float(measure(parts.sum(0))), 2)}
    return main | {name: round(value, 2) for name, value in _others(kind, name, found).items()}


def need_for(metrics: Iterable[str]) -> None:
    """Ask for the packages that some tasks' scores need, before the answers that would be lost without them.

    Args:
        metrics: the main metric of each task.

    Raises:
        MissingFrameworkError: one is not installed.
    """
    for metric in metrics:
        if metric == "entity_f1":
            finder()
        elif metric == "exact_match":
            _sacrebleu()


def interval(kind: str, found: Sequence[Answer], seed: int = 0) -> tuple[float, float]:
    """The 95 percent interval of the main score, from a bootstrap over rows with 1,000 draws of as many rows.

    Draws without a score, for example because no row has an entity, are left out.

    Args:
        kind: the task's.
        found: the answers behind the score.
        seed: of the draws.

    Raises:
        ConfigError, DataError, MissingFrameworkError: as for :func:`scores`.
    """
    _check(kind, found)
    _, parts, measure = _main(kind, found)
    sums = np.empty((_DRAWS, parts.shape[1]))
    words = rng.key("bootstrap", seed)
    for draw in range(_DRAWS):
        places = rng.uniform(words, np.array(draw), np.arange(len(found)))
        sums[draw] = parts[(places * len(found)).astype(np.int64)].sum(0)
    values = measure(sums)
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, [_TAIL, 100.0 - _TAIL])
    return round(float(low), 2), round(float(high), 2)


_KINDS = ("seq2seq", "causal", "classification", "regression", "tagging", "masked")


def _check(kind: str, found: Sequence[Answer]) -> None:
    if kind not in _KINDS:
        raise ConfigError(
            f"no kind {kind!r}{near(str(kind), _KINDS)}; the kinds are: {listed(_KINDS)}"
        )
    if not found:
        raise DataError("no answers to score")
    for number, answer in enumerate(found):
        if answer.target is None:
            raise DataError(
                f"answer {number} cannot be scored: its row does not say what is wanted"
            )


def _main(kind: str, found: Sequence[Answer]) -> tuple[str, Sums, Measure]:
    """The main score: its name, what each row adds to some sums, and the score that sums give, of any draw of rows."""
    if kind in ("seq2seq", "causal"):
        return "exact_match", _rights(found), _percent
    if kind == "classification":
        return "accuracy", _rights(found), _percent
    if kind == "masked":
        parts = [(a.detail["right"], a.detail["masked"]) for a in found]
        return "accuracy", np.array(parts, np.float64), _percent
    if kind == "regression":
        pairs = [(a.detail["value"], a.detail["wanted"]) for a in found]
        x, y = np.array(pairs, np.float64).T
        # Around their means, so that no digits are lost in the sums.
        x, y = x - x.mean(), y - y.mean()
        return "pearson", np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1), _pearson
    if found[0].detail["entities"]:
        counts = [counted(a.detail["wanted"], a.detail["tags"]) for a in found]
        return "entity_f1", np.array(counts, np.float64), _f1
    return "accuracy", _words(found), _percent


def _others(kind: str, main: str, found: Sequence[Answer]) -> dict[str, float]:
    if kind in ("seq2seq", "causal"):
        return {"chrf": _chrf(found)}
    if kind == "classification":
        return {"macro_f1": _macro_f1([(str(a.target), a.output) for a in found])}
    if kind == "regression":
        x, y = np.array([(a.detail["value"], a.detail["wanted"]) for a in found], np.float64).T
        return {"spearman": _spearman(x, y), "rmse": float(np.sqrt(np.mean((x - y) ** 2)))}
    if kind == "masked":
        masked = sum(a.detail["masked"] for a in found)
        loss = sum(a.detail["loss"] for a in found) / masked if masked else math.nan
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf if masked else math.nan}
    if main == "accuracy":
        pairs = [
            (wanted, said or "")
            for a in found
            for wanted, said in zip(a.detail["wanted"], a.detail["tags"], strict=True)
        ]
        return {"macro_f1": _macro_f1(pairs)}
    return {"accuracy": float(_percent(_words(found).sum(0)))}


def _rights(found: Sequence[Answer]) -> Sums:
    return np.array([(bool(a.right), 1.0) for a in found], np.float64)


def _words(found: Sequence[Answer]) -> Sums:
    """Right words and all words of each row; words that were lost are wrong."""
    parts = []
    for answer in found:
        pairs = [*zip(answer.detail["wanted"], answer.detail["tags"], strict=True)]
        parts.append((sum(wanted == said for wanted, said in pairs), len(pairs)))
    return np.array(parts, np.float64)


def _percent(sums: Sums) -> Sums:
    return _ratio(100.0 * sums[..., 0], sums[..., 1])


def _f1(sums: Sums) -> Sums:
    """Of (right, said, wanted) entities."""
    return _ratio(200.0 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _pearson(sums: Sums) -> Sums:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.sqrt(np.maximum(n * xx - x * x, 0.0) * np.maximum(n * yy - y * y, 0.0))
    correlation: Sums = 100.0 * np.clip(_ratio(n * xy - x * y, spread), -1.0, 1.0)
    return correlation


def _ratio(part: Sums, whole: Sums) -> Sums:
    """NaN where the whole is 0."""
    part, whole = np.asarray(part), np.asarray(whole)
    found: Sums = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return found


def _spearman(x: Sums, y: Sums) -> float:
    """Pearson's correlation of ranks, those of equal values averaged."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        ranks.append((last - (counts - 1) / 2.0)[inverse])
    a, b = (r - r.mean() for r in ranks)
    parts = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], 1)
    return float(_pearson(parts.sum(0)))


def _macro_f1(pairs: Sequence[tuple[str, str]]) -> float:
    """F1 averaged over the labels that are wanted or said; what is lost ("") is no label."""
    wanted, said = np.array([w for w, _ in pairs]), np.array([s for _, s in pairs])
    found = []
    for label in sorted({label for pair in pairs for label in pair} - {""}):
        both = np.sum((wanted == label) & (said == label))
        found.append(200.0 * both / (np.sum(wanted == label) + np.sum(said == label)))
    return float(np.mean(found)) if found else math.nan


def _chrf(found: Sequence[Answer]) -> float:
    wanted = [[str(a.target).strip() for a in found]]
    return float(_sacrebleu().corpus_chrf([a.output for a in found], wanted).score)


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise missing_extra("chrF", "train", error) from None
    return sacrebleu
