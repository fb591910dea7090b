"""The truth: the specification's formula in float64 numpy, position by position, with none of flix's algorithms.

    y_e = W0 x_e + b + Σ_f  w_ef · s_f · B_f (A_f x_e)

An embedding is the same with a one-hot x. Every function is a polynomial with positive coefficients in its inputs, so
that calling it with absolute values bounds the size of what was summed: the scale that rounding errors go by.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flix_conformance.harness import AdamW, Array, Batch, Case, Pairs
from flix_conformance.table import Feature


@dataclass(frozen=True)
class Gradients:
    """Gradients of Σ y · dy."""

    x: Array
    weights: Array
    pairs: Pairs


def scale(case: Case, feature: Feature) -> float:
    """s_f, by the kit's own table and the pair's own rank."""
    return case.table.scale(feature, case.pairs[feature][0].shape[0])


def dense_x(case: Case) -> Array:
    """x in float64; an embedding's tokens as one-hot vectors."""
    if case.kind == "embedding":
        return np.equal.outer(case.x, np.arange(case.d_in)).astype(np.float64)  # type: ignore[no-any-return]
    return case.x.astype(np.float64)


def _terms(case: Case) -> Iterator[tuple[tuple[int, ...], int, Feature, float]]:
    """(place in the routing, entry, feature, weight) of all that acts."""
    for place in np.ndindex(*case.ids.shape):
        number = int(case.ids[place])
        feature = case.table.features[number] if number >= 0 else None
        if feature in case.pairs:
            weight = 1.0 if case.weights is None else float(case.weights[place])
            yield place[:-1], place[-1], feature, weight


def forward(case: Case) -> Array:
    """The output ``[B, ..., d_out]``."""
    x = dense_x(case)
    y = x @ case.kernel.astype(np.float64)
    if case.bias is not None:
        y = y + case.bias
    for place, _, feature, weight in _terms(case):
        a, b = (part.astype(np.float64) for part in case.pairs[feature])
        y[place] += weight * scale(case, feature) * (x[place] @ a.T @ b.T)
    return y


def gradients(case: Case, dy: Array) -> Gradients:
    """Gradients of Σ y · dy, derived by hand."""
    x = dense_x(case)
    dx = dy @ case.kernel.astype(np.float64).T
    d_weights = np.zeros(case.ids.shape)
    pairs = {f: (np.zeros(a.shape), np.zeros(b.shape)) for f, (a, b) in sorted(case.pairs.items())}
    for place, entry, feature, weight in _terms(case):
        a, b = (part.astype(np.float64) for part in case.pairs[feature])
        s = scale(case, feature)
        here, there = x[place].reshape(-1, case.d_in), dy[place].reshape(-1, case.d_out)
        h, dh = here @ a.T, there @ b
        d_weights[(*place, entry)] = s * (h * dh).sum()
        da, db = pairs[feature]
        da += weight * s * dh.T @ here
        db += weight * s * there.T @ h
        dx[place] += weight * s * (dh @ a).reshape(dx[place].shape)
    return Gradients(dx, d_weights, pairs)


def clear(case: Case, batch: Batch, frozen: Collection[Feature] = ()) -> bool:
    """Whether a training step's gradients stand out from float32's rounding and from AdamW's eps, but for frozen ones.

    AdamW moves an element as far by a gradient that is rounding alone as by any other, and there no two programs agree.
    """
    now = case.but(x=batch.x, ids=batch.ids, weights=batch.weights)
    large, rows = magnitude(now), max(len(batch.x), 1)
    found = gradients(now, (forward(now) - batch.target) / rows)
    size = gradients(large, (forward(large) + np.abs(batch.target)) / rows)
    for feature in set(listed(case, batch.ids)) - set(frozen):
        for g, s in zip(found.pairs[feature], size.pairs[feature], strict=True):
            if ((s > 0) & (np.abs(g) < np.maximum(1e-3 * s, 1e-4))).any():
                return False
    return True


def magnitude(case: Case) -> Case:
    """The case with absolute values: what the sizes of the sums are computed from."""
    return case.but(
        kernel=np.abs(case.kernel),
        bias=None if case.bias is None else np.abs(case.bias),
        pairs={f: (np.abs(a), np.abs(b)) for f, (a, b) in case.pairs.items()},
        x=case.x if case.kind == "embedding" else np.abs(case.x),
        weights=None if case.weights is None else np.abs(case.weights),
    )


def merged(case: Case, active: Mapping[Feature, float]) -> Array:
    """W0 + Σ w s (B A)ᵀ, ``[d_in, d_out]``."""
    kernel = case.kernel.astype(np.float64)
    for feature, weight in active.items():
        if feature in case.pairs:
            a, b = (part.astype(np.float64) for part in case.pairs[feature])
            kernel = kernel + weight * scale(case, feature) * (b @ a).T
    return kernel


def nearest(case: Case, origins: Sequence[Feature], rank: int) -> tuple[Array, float]:
    """The mean update of some features, ``[d_out, d_in]``, and how near a matrix of this rank can come to it."""
    mean = np.zeros((case.d_out, case.d_in))
    for feature in origins:
        if feature in case.pairs:
            a, b = (part.astype(np.float64) for part in case.pairs[feature])
            mean += scale(case, feature) * (b @ a) / len(origins)
    left_out = np.linalg.svd(mean, compute_uv=False)[rank:]
    return mean, float(np.sqrt((left_out**2).sum()))


class Run:
    """A training run of layers that follow each other, one step of AdamW after another.

    A feature that no row lists is not touched, its step count included; nor is a frozen one.

    Attributes:
        layers: the layers' cases, in order, with the values of now.
    """

    def __init__(self, layers: Sequence[Case], settings: AdamW) -> None:
        self.layers, self.settings = [_in_float64(case) for case in layers], settings
        self.moments: dict[Any, tuple[Array, Array, int]] = {}

    def step(self, batch: Batch, frozen: Collection[Feature] = ()) -> list[Pairs]:
        """One step, and each layer's pairs after it."""
        given, y = [], batch.x
        for case in self.layers:
            given.append(case.but(x=y, ids=batch.ids, weights=batch.weights))
            y = forward(given[-1])
        dy = (y - batch.target) / len(batch.x)
        for place, case in reversed([*enumerate(given)]):
            found = gradients(case, dy)
            dy, pairs = found.x, dict(case.pairs)
            for feature in set(listed(case, batch.ids)) - set(frozen):
                pairs[feature] = self._moved(place, feature, pairs[feature], found.pairs[feature])
            self.layers[place] = self.layers[place].but(pairs=pairs)
        return [case.pairs for case in self.layers]

    def _moved(self, place: int, feature: Feature, pair: Any, gradient: Any) -> Any:
        s, moved = self.settings, []
        for part, (p, g) in enumerate(zip(pair, gradient, strict=True)):
            m, v, count = self.moments.get((place, feature, part), (0.0 * p, 0.0 * p, 0))
            m, v, count = (
                s.beta1 * m + (1 - s.beta1) * g,
                s.beta2 * v + (1 - s.beta2) * g * g,
                count + 1,
            )
            self.moments[place, feature, part] = (m, v, count)
            step = m / (1 - s.beta1**count) / (np.sqrt(v / (1 - s.beta2**count)) + s.eps)
            moved.append(p - s.lr * (step + s.decay * p))
        return tuple(moved)


def _in_float64(case: Case) -> Case:
    pairs = {f: (a.astype(np.float64), b.astype(np.float64)) for f, (a, b) in case.pairs.items()}
    return case.but(pairs=pairs)


def train(
    case: Case, batches: Sequence[Batch], settings: AdamW, frozen: Collection[Feature] = ()
) -> list[Pairs]:
    """The pairs of one layer after each step of a :class:`Run`."""
    run = Run([case], settings)
    return [run.step(batch, frozen)[0] for batch in batches]


def listed(case: Case, ids: Array) -> list[Feature]:
    """The features that some row lists, with whatever weight, and that have an update."""
    numbers = sorted({int(i) for i in ids.ravel() if i >= 0})
    return [case.table.features[i] for i in numbers if case.table.features[i] in case.pairs]
