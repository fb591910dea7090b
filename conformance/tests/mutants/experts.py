"""Broken in mixtures of experts alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from flix_numpy import Layer

from mutants._mixture import Harness, Kernel, Moe, Primitives
from mutants._registry import mutant


class FirstUpdate(Kernel):
    def one(self, number: int) -> Layer:
        layer = super().one(number)
        layer.pairs = {f: [part[0] for part in pair] for f, pair in self.pairs.items()}
        return layer


@mutant("adds the first expert's update to what every expert gives", "experts")
class AddsTheFirst(Harness):
    kernel_of = FirstUpdate


@mutant("starts every expert alike", "experts")
class StartsAlike(Primitives):
    def attach(self, model: Any, config: Any, paths: Any, strategy: str, values: Any) -> Any:
        def alike(path: str, shape: Any) -> Any:
            made = values(path, shape)
            if not shape.experts:
                return made
            return {f: tuple(np.repeat(v[:1], len(v), 0) for v in pair) for f, pair in made.items()}

        return super().attach(model, config, paths, strategy, alike)


class BeforeTheGate(Moe):
    def parts(self, x: Any, ids: Any, weights: Any) -> Any:
        for before, after, *rest in super().parts(x, ids, weights):
            after.pairs = {}
            yield before, after, *rest


@mutant("adds features before the gate alone", "experts")
class AddsBeforeTheGate(Harness):
    model_of = BeforeTheGate


class OtherRows(Moe):
    def later(self, ids: Any) -> Any:
        return None if ids is None else ids[::-1]


@mutant("adds other rows' features after the gate", "experts")
class AddsOthers(Harness):
    model_of = OtherRows


class SharesTwice(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        for feature, s, a, b, rows, entries, factor, h in super().active(x, ids, weights):
            yield feature, s, a, b, rows, entries, factor / 2, h


class SharesTwiceKernel(Kernel):
    single = SharesTwice


@mutant("halves what features add to a position that two experts have", "experts")
class Halves(Harness):
    kernel_of = SharesTwiceKernel


class NoSlope(Moe):
    def parts(self, x: Any, ids: Any, weights: Any) -> Any:
        for *first, slope in super().parts(x, ids, weights):
            yield *first, np.ones_like(slope)


@mutant("takes the gate for linear on the way back", "experts_gradients")
class LinearGate(Harness):
    model_of = NoSlope


@mutant("gives the weights the gradient that one of an expert's kernels has", "experts_gradients")
class OneKernelsWeights(Harness):
    def gradients(self, model: Any, batch: Any, dy: Any) -> Any:
        found = super().gradients(model, batch, dy)
        if isinstance(model, Moe):
            zeros = {f: [0 * p for p in pair] for f, pair in model["moe.down"].pairs.items()}
            held, model["moe.down"].pairs = model["moe.down"].pairs, zeros
            found["weights"] = super().gradients(model, batch, dy)["weights"]
            model["moe.down"].pairs = held
        return found


@mutant("leaves the pairs of experts that get nothing as they are", "experts_live")
class IdleStay(Harness):
    def trainer(self, model: Any, settings: Any) -> Any:
        step = super().trainer(model, settings)
        if not isinstance(model, Moe):
            return step
        idle = np.setdiff1d(np.arange(len(model.experts.up)), model.experts.sent)

        def some(batch: Any) -> None:
            before = {p: {f: [v.copy() for v in pair] for f, pair in k.pairs.items()} for p, k in model.items()}  # fmt: skip
            step(batch)
            for path, kernel in model.items():
                for feature, pair in kernel.pairs.items():
                    for part in (0, 1):
                        pair[part][idle] = before[path][feature][part][idle]

        return some


@mutant("merges the mean of the experts' updates into each", "experts_live")
class MergesTheMean(Primitives):
    def turned(self, update: Any) -> Any:
        turned = super().turned(update)
        return np.broadcast_to(turned.mean(0), turned.shape)


@mutant("reads the experts of a file from the last to the first", "experts_live")
class OtherOrder(Primitives):
    def attach(self, model: Any, config: Any, paths: Any, strategy: str, values: Any) -> Any:
        def turned(path: str, shape: Any) -> Any:
            made = values(path, shape)
            if not shape.experts or not any(np.any(b) for _, b in made.values()):
                return made
            return {f: (a[::-1], b[::-1]) for f, (a, b) in made.items()}

        return super().attach(model, config, paths, strategy, turned)
