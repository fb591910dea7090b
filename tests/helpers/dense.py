"""The dense reference: the formula in numpy and float64, one position at a time, by none of flix's algorithms.

y = W x + Σ w s B A x, over the features of a position (docs/specification.md §1.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import flix
from tests.helpers.tolerance import numpy_of

Pairs = dict[int, tuple[np.ndarray, np.ndarray, float]]
"""{id: (A ``[r, d_in]``, B ``[d_out, r]``, scale)}; a feature of rank 0 may be there or not."""


@dataclass
class Dense:
    """What a layer gives, and the gradients of a loss whose gradient to the output was given (zeros without one).

    Attributes:
        y: ``[*lead, d_out]``.
        x: ``[*lead, d_in]``.
        weights: the shape of the ids.
        A: {id: ``[r, d_in]``}.
        B: {id: ``[d_out, r]``}.
    """

    y: np.ndarray
    x: np.ndarray
    weights: np.ndarray
    A: dict[int, np.ndarray] = field(default_factory=dict)
    B: dict[int, np.ndarray] = field(default_factory=dict)


def dense(
    x: Any,
    ids: Any,
    pairs: Pairs,
    weights: Any = None,
    *,
    kernel: Any = None,
    bias: Any = None,
    dy: Any = None,
) -> Dense:
    """Each position through its own whole matrix.

    Args:
        x: ``[B, ..., d_in]``; one-hot rows stand for an embedding's tokens.
        ids: ``[B, W]``, or with the leading shape of x for routing by token; -1 is padding.
        pairs: the layer's.
        weights: the shape of ids; None for ones.
        kernel: ``[d_out, d_in]``; None for the update alone.
        bias: ``[d_out]``.
        dy: ``[B, ..., d_out]``, a loss's gradient to y.
    """
    x, ids = numpy_of(x), numpy_of(ids)
    w = np.ones(ids.shape) if weights is None else numpy_of(weights)
    if kernel is None:
        d_out = next(len(b) for _, b, _ in pairs.values())
        base = np.zeros((d_out, x.shape[-1]))
    else:
        base = numpy_of(kernel)
        d_out = len(base)
    out = Dense(
        y=np.zeros((*x.shape[:-1], d_out)),
        x=np.zeros_like(x),
        weights=np.zeros(ids.shape),
        A={i: np.zeros_like(a) for i, (a, _, _) in pairs.items()},
        B={i: np.zeros_like(b) for i, (_, b, _) in pairs.items()},
    )
    back = None if dy is None else numpy_of(dy)
    for place in np.ndindex(*x.shape[:-1]):
        row = place[: ids.ndim - 1]
        slots = [(*row, slot) for slot in range(ids.shape[-1]) if int(ids[(*row, slot)]) in pairs]
        whole = base.copy()
        for slot in slots:
            a, b, s = pairs[int(ids[slot])]
            whole += w[slot] * s * (b @ a)
        out.y[place] = whole @ x[place] + (0 if bias is None else numpy_of(bias))
        if back is None:
            continue
        g = back[place]
        out.x[place] = whole.T @ g
        for slot in slots:
            i = int(ids[slot])
            a, b, s = pairs[i]
            h, down = a @ x[place], b.T @ g
            out.weights[slot] += s * (down @ h)
            out.A[i] += w[slot] * s * np.outer(down, x[place])
            out.B[i] += w[slot] * s * np.outer(g, h)
    return out


def by_id(settings: flix.FlixConfig, triples: Iterable[tuple[tuple[str, str], Any, Any]]) -> Pairs:
    """A layer's (feature, A, B) triples by id, with the scales that the configuration declares."""
    found = {}
    for feature, a, b in triples:
        a, b = numpy_of(a), numpy_of(b)
        found[settings.registry.id(*feature)] = (a, b, scale(settings, feature, len(a)))
    return found


def scale(settings: flix.FlixConfig, feature: tuple[str, str], rank: int) -> float:
    """s of a feature of some rank: alpha over the rank, or over its root; alpha is the rank where none was given."""
    if rank == 0:
        return 0.0
    alpha = settings.alpha
    if isinstance(alpha, Mapping):
        alpha = alpha.get(feature, rank)
    return (rank if alpha is None else alpha) / (
        rank if settings.scaling == "lora" else math.sqrt(rank)
    )
