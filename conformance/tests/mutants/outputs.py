"""Broken outputs, merges and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flix_numpy import Layer, Primitives
from flix_numpy.conformance import AdamW, Harness

from flix.backends.verbs import Verbs
from mutants._registry import ChangedFactors, ChangedGradients, mutant


@mutant("scales by alpha instead of alpha / r", "forward")
class WrongScale(ChangedFactors):
    def factor(self, factor: Any, feature: Any, x: Any) -> Any:
        return factor * len(self.pairs[feature][0])


@mutant("multiplies by B transposed, or upside down where it is not square", "forward")
class TransposedB(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        for feature, s, a, b, *rest in super().active(x, ids, weights):
            yield feature, s, a, b.T if b.shape[0] == b.shape[1] else b[::-1], *rest


@mutant("ignores the weights", "forward")
class IgnoresWeights(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        return super().active(x, ids, None)


@mutant("multiplies A x in float16", "forward")
class HalfPrecision(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        for feature, s, a, b, rows, entries, factor, _ in super().active(x, ids, weights):
            h = x[rows] @ a.astype(np.float16).astype(a.dtype).T
            yield feature, s, a, b, rows, entries, factor, h


@mutant("adds the bias twice where a row has features", "forward")
class BiasTwice(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        twice = 0 if self.bias is None or not (ids >= 0).any() else self.bias
        return super().__call__(x, ids, weights) + twice


@mutant("routes every token of a row as its first", "forward")
class FirstTokenOnly(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if ids.ndim == 3:
            ids = np.repeat(ids[:, :1], ids.shape[1], 1)
            weights = None if weights is None else np.repeat(weights[:, :1], ids.shape[1], 1)
        return super().__call__(x, ids, weights)


@mutant("looks up a token's neighbour in an embedding's A", "embedding_forward")
class NextToken(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        for feature, s, a, b, rows, entries, factor, h in super().active(x, ids, weights):
            if self.shape.kind == "embedding":
                h = np.roll(x[rows], 1, -1) @ a.T
            yield feature, s, a, b, rows, entries, factor, h


@mutant("answers in float32 whatever the layer is in", "output_dtype")
class WrongDtype(Harness):
    def call(self, model: Any, batch: Any, path: Any = None) -> Any:
        return super().call(model, batch, path)[0].astype(np.float32), "float32"


@mutant("mixes a trace of the previous output in", "repeatable")
class Remembers(Harness):
    last: Any = None

    def call(self, model: Any, batch: Any, path: Any = None) -> Any:
        y, dtype = super().call(model, batch, path)
        if self.last is not None and self.last.shape == y.shape:
            y = y + self.last * np.asarray(1e-3, y.dtype)
        self.last = y
        return y, dtype


@mutant("scales x in place", "inputs_unchanged")
class MutatesInput(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        y = super().__call__(x, ids, weights)
        x *= 2
        return y


@mutant("sorts the ids in place", "inputs_unchanged")
class SortsIds(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        y = super().__call__(x, ids, weights)
        ids[...] = np.sort(ids, -1)[..., ::-1]
        return y


@mutant("merges without the scale", "merge")
class MergesUnscaled(Verbs):
    def merge(self, model: Any, row: Any) -> Any:
        model.state.config = replace(model.state.config, alpha=None, scaling="lora")
        return super().merge(model, row)


@mutant("adds a square update the wrong way round", "merge")
class MergesTransposed(Primitives):
    def merged(self, model: Any, active: Any, update: Any) -> Any:
        def turned(path: str) -> Any:
            found = update(path)
            return found.T if found.shape[0] == found.shape[1] else found

        return super().merged(model, active, turned)


@mutant("merges with every weight 1", "merge")
class MergesUnweighted(Verbs):
    def merge(self, model: Any, row: Any) -> Any:
        names = {g: list(v) if isinstance(v, Mapping) else v for g, v in row.items()}
        return super().merge(model, names)


@mutant("gives x the base's gradient alone", "gradient_x")
class BaseGradient(Layer):
    def backward(self, x: Any, ids: Any, weights: Any, dy: Any) -> Any:
        return dy @ self.kernel.T, *super().backward(x, ids, weights, dy)[1:]


@mutant("takes the mean over the batch for A's gradient", "gradient_a")
class MeanGradient(ChangedGradients):
    def change(self, feature: Any, a: Any, b: Any, x: Any) -> Any:
        return a / len(x), b


@mutant("forgets the scale in B's gradient", "gradient_b")
class UnscaledGradient(ChangedGradients):
    def change(self, feature: Any, a: Any, b: Any, x: Any) -> Any:
        return a, b / self.state.config.scale(self.path, feature)


@mutant("leaves features of weight 0 without the weight's gradient", "gradient_weights")
class NoGradientAtZero(Layer):
    def backward(self, x: Any, ids: Any, weights: Any, dy: Any) -> Any:
        dx, d_weights, pairs = super().backward(x, ids, weights, dy)
        return dx, d_weights if weights is None else np.where(weights == 0, 0, d_weights), pairs


@mutant("averages the gradients of a token that occurs several times", "embedding_gradients")
class AveragesTokens(ChangedGradients):
    def change(self, feature: Any, a: Any, b: Any, x: Any) -> Any:
        if self.shape.kind == "embedding" and x.size:
            tokens, counts = np.unique(x, return_counts=True)
            a[:, tokens] /= counts
        return a, b


@mutant("gives an embedding's weights no gradient", "embedding_gradients")
class NoWeightsOfTokens(Layer):
    def backward(self, x: Any, ids: Any, weights: Any, dy: Any) -> Any:
        dx, d_weights, pairs = super().backward(x, ids, weights, dy)
        return dx, d_weights * (self.shape.kind == "linear"), pairs


@mutant("leaks a gradient to the base", "base_frozen")
class LeaksGradient(Harness):
    def gradients(self, model: Any, batch: Any, dy: Any) -> Any:
        (layer,) = model.values()
        base = np.full(layer.kernel.shape, 1e-3)
        return {**super().gradients(model, batch, dy), "base": base}


@mutant("lets weight decay reach the base", "base_frozen")
class DecaysBase(AdamW):
    def step(self, gradients: Any) -> None:
        super().step(gradients)
        decayed = self.layer.kernel * (1 - self.settings.lr * self.settings.decay)
        self.layer.kernel = decayed.astype(self.layer.dtype)


@mutant("takes routing for a merged model, and heeds none of it", "merged_anew")
class MergedTakesRouting(Primitives):
    def merged(self, model: Any, active: Any, update: Any) -> Any:
        plain = super().merged(model, active, update)
        made = type("Deaf", (type(plain),), {"__call__": lambda self, x, ids=None, weights=None: type(plain).__call__(self, x, *((ids, weights) if self.state else ()))})(plain)  # fmt: skip
        made.held = plain.held
        return made


@mutant("takes the kernel of before the merge for the base when it is adapted anew", "merged_anew")
class ForgetsTheMerge(Verbs):
    def merge(self, model: Any, row: Any, **options: Any) -> Any:
        merged = super().merge(model, row, **options)
        for path, layer in merged.items():
            layer.before = model[path].kernel
        return merged

    def adapt(self, model: Any, config: Any, **options: Any) -> Any:
        for layer in model.values():
            layer.kernel = getattr(layer, "before", layer.kernel)
        return super().adapt(model, config, **options)
