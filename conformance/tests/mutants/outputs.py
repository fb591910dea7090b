"""Broken outputs, merges and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flix_numpy import Harness, Layer

from mutants._registry import ChangedGradients, mutant


@mutant("scales by alpha instead of alpha / r", "forward")
class WrongScale(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        for feature, s, a, b, listed, factor in super().active(x, ids, weights):
            yield feature, s * len(a), a, b, listed, factor * len(a)


@mutant("multiplies by B transposed, or upside down where it is not square", "forward")
class TransposedB(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        for feature, s, a, b, listed, factor in super().active(x, ids, weights):
            yield feature, s, a, b.T if b.shape[0] == b.shape[1] else b[::-1], listed, factor


@mutant("ignores the weights", "forward")
class IgnoresWeights(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        return super().active(x, ids, None)


@mutant("multiplies A x in float16", "forward")
class HalfPrecision(Layer):
    def down(self, x: Any, a: Any) -> Any:
        return super().down(x, a.astype(np.float16)).astype(a.dtype)


@mutant("adds the bias twice where a row has features", "forward")
class BiasTwice(Layer):
    def forward(self, x: Any, ids: Any, weights: Any = None) -> Any:
        return super().forward(x, ids, weights) + (
            0 if self.bias is None or not (ids >= 0).any() else self.bias
        )


@mutant("routes every token of a row as its first", "forward")
class FirstTokenOnly(Layer):
    def forward(self, x: Any, ids: Any, weights: Any = None) -> Any:
        if ids.ndim == 3:
            ids = np.repeat(ids[:, :1], ids.shape[1], 1)
            weights = None if weights is None else np.repeat(weights[:, :1], ids.shape[1], 1)
        return super().forward(x, ids, weights)


@mutant("looks up a token's neighbour in an embedding's A", "embedding_forward")
class NextToken(Layer):
    def down(self, x: Any, a: Any) -> Any:
        tokens = self.shape.kind == "embedding" and len(a) != self.shape.d_out
        return super().down((x + 1) % self.shape.d_in if tokens else x, a)


@mutant("answers in float32 whatever the layer is in", "output_dtype")
class WrongDtype(Harness):
    def forward(self, case: Any) -> Any:
        return super().forward(case)[0].astype(np.float32), "float32"


@mutant("mixes a trace of the previous output in", "repeatable")
class Remembers(Harness):
    def __init__(self) -> None:
        self.last: Any = None

    def forward(self, case: Any) -> Any:
        found = super().forward(case)
        if self.last is not None and self.last.shape == found[0].shape:
            found = (found[0] + self.last * np.asarray(1e-3, found[0].dtype), found[1])
        self.last = found[0]
        return found


@mutant("scales x in place", "inputs_unchanged")
class MutatesInput(Layer):
    def forward(self, x: Any, ids: Any, weights: Any = None) -> Any:
        y = super().forward(x, ids, weights)
        x *= 2
        return y


@mutant("sorts the ids in place", "inputs_unchanged")
class SortsIds(Layer):
    def forward(self, x: Any, ids: Any, weights: Any = None) -> Any:
        y = super().forward(x, ids, weights)
        ids[...] = np.sort(ids, -1)[..., ::-1]
        return y


@mutant("merges without the scale", "merge")
class MergesUnscaled(Harness):
    def merge(self, case: Any, row: Any) -> Any:
        return super().merge(case.but(config=replace(case.config, alpha=None, scaling="lora")), row)


@mutant("merges with every weight 1", "merge")
class MergesUnweighted(Harness):
    def merge(self, case: Any, row: Any) -> Any:
        names = {g: list(v) if isinstance(v, Mapping) else v for g, v in row.items()}
        return super().merge(case, names)


@mutant("gives x the base's gradient alone", "gradient_x")
class BaseGradient(ChangedGradients):
    def change(self, found: Any, x: Any, dy: Any) -> None:
        found["x"] = None if found["x"] is None else dy @ self.kernel.T


@mutant("takes the mean over the batch for A's gradient", "gradient_a")
class MeanGradient(ChangedGradients):
    def change(self, found: Any, x: Any, dy: Any) -> None:
        found["pairs"] = {f: (a / len(x), b) for f, (a, b) in found["pairs"].items()}


@mutant("forgets the scale in B's gradient", "gradient_b")
class UnscaledGradient(ChangedGradients):
    def change(self, found: Any, x: Any, dy: Any) -> None:
        found["pairs"] = {
            f: (a, b / self.config.scale(self.path, f)) for f, (a, b) in found["pairs"].items()
        }


@mutant("leaves features of weight 0 without the weight's gradient", "gradient_weights")
class NoGradientAtZero(Layer):
    def backward(self, x: Any, ids: Any, weights: Any, dy: Any) -> Any:
        found = super().backward(x, ids, weights, dy)
        if weights is not None:
            found["weights"] = np.where(weights == 0, 0, found["weights"])
        return found


@mutant("averages the gradients of a token that occurs several times", "embedding_gradients")
class AveragesTokens(Layer):
    def backward(self, x: Any, ids: Any, weights: Any, dy: Any) -> Any:
        found = super().backward(x, ids, weights, dy)
        if self.shape.kind == "embedding" and x.size:
            tokens, counts = np.unique(x, return_counts=True)
            for a, _ in found["pairs"].values():
                a[:, tokens] /= counts
        return found


@mutant("leaks a gradient to the base", "base_frozen")
class LeaksGradient(ChangedGradients):
    def change(self, found: Any, x: Any, dy: Any) -> None:
        found["base"] = np.full(self.kernel.shape, 1e-3)


@mutant("lets weight decay reach the base", "base_frozen")
class DecaysBase(Layer):
    def adamw(self, gradients: Any, s: Any) -> None:
        super().adamw(gradients, s)
        self.kernel = (self.kernel * (1 - s.lr * s.decay)).astype(self.kernel.dtype)
