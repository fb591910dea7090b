"""Broken where values are not finite, where routing is missing, and where rows differ that may not."""

from __future__ import annotations

from typing import Any

import numpy as np
from flix_numpy import Layer, current
from flix_numpy.conformance import Harness

from flix.backends import messages
from flix.core.strategy.union import first_unlike
from mutants._registry import AnyWay, ChangedGradients, OptionalHarness, SeveralWays, mutant


@mutant("multiplies what a row does not use by 0", "isolated")
class MasksByZero(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        y = super().__call__(x, ids, weights)
        with np.errstate(all="ignore"):
            for a, b in self.pairs.values():
                y = y + 0 * (self.dense(x) @ a.T @ b.T)
        return y


@mutant("multiplies by a weight of 0", "isolated")
class TimesZero(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        y = super().__call__(x, ids, weights)
        if weights is not None:
            for feature, pair in self.pairs.items():
                number = self.state.config.registry.id(*feature)
                off = ((ids == number) & (weights == 0)).any(-1)
                y[off] += np.asarray(0 * sum(p.sum() for p in pair), y.dtype)
        return y


@mutant("replaces what overflows by 0, with all of its row's batch", "isolated")
class CleansBatch(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        y = super().__call__(x, ids, weights)
        return y if np.isfinite(y).all() else 0 * np.nan_to_num(y)


@mutant("gives x the gradients of features that are not listed, times 0", "isolated_gradients")
class LeaksToX(Layer):
    def backward(self, x: Any, ids: Any, weights: Any, dy: Any) -> Any:
        dx, *rest = super().backward(x, ids, weights, dy)
        with np.errstate(all="ignore"):
            leak = sum((0 * (dy @ b @ a) for a, b in self.pairs.values()), np.zeros_like(dx))
        return dx + leak, *rest


@mutant("scales all gradients by the norm of all", "isolated_gradients")
class ClipsByNorm(ChangedGradients):
    def change(self, feature: Any, a: Any, b: Any, x: Any) -> Any:
        broken = not all(np.isfinite(p).all() for pair in self.pairs.values() for p in pair)
        return (0 * a, 0 * b) if broken else (a, b)


@mutant('computes all rows as the first under "single"', "unlike_rows", AnyWay, SeveralWays)
class TakesTheFirst(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if self.state is not None and self.state.strategy == "single":
            ids = np.repeat(ids[:1], len(ids), 0)
            weights = None if weights is None else np.repeat(weights[:1], len(weights), 0)
        return super().__call__(x, ids, weights)


@mutant("counts positions where it names the row that differs", "unlike_rows", AnyWay, SeveralWays)
class CountsPositions(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if self.state is not None and self.state.strategy == "single":
            place = first_unlike(ids.reshape(-1, ids.shape[-1]), None)
            if place is not None:
                raise messages.rows_differ(place)
        return super().__call__(x, ids, weights)


@mutant("serves the base to calls without routing", "without_routing")
class SilentBase(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        return () if ids is None and weights is None else super().active(x, ids, weights)


@mutant("serves calls without routing by the routing before", "without_routing")
class LastRouting(Harness):
    last: Any = None

    def call(self, model: Any, batch: Any, path: Any = None) -> Any:
        if batch.ids is None and self.last is not None:
            batch = self.last
        self.last = batch
        return super().call(model, batch, path)


@mutant("refuses calls without routing in training alone", "without_routing")
class EvaluatesBase(OptionalHarness):
    def evaluated(self, model: Any, batch: Any) -> Any:
        with current.under(**({"off": model.state} if batch.ids is None else {})):
            return self.call(model, batch)
