"""Broken only where there is much of something: features, inputs, examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from flix_numpy import Layer, Primitives
from flix_numpy.conformance import AdamW

from flix.backends.verbs import Verbs
from mutants._registry import mutant


class OtherIds(Layer):
    """A layer that reads ids in its own way."""

    def read(self, ids: Any) -> Any:
        raise NotImplementedError

    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        return super().active(x, self.read(ids), weights)


@mutant("keeps ids in 8 bits", "many_features")
class NarrowIds(OtherIds):
    def read(self, ids: Any) -> Any:
        return ids.astype(np.uint8).astype(np.int32) if (ids >= 0).all() else ids


@mutant("takes ids from 512 on for those of before", "many_features")
class FoldedIds(OtherIds):
    def read(self, ids: Any) -> Any:
        return np.where(ids < 512, ids, ids - 512)


@mutant("forgets what a batch lists beyond 512 entries", "many_features")
class ForgetsEntries(OtherIds):
    def read(self, ids: Any) -> Any:
        kept = ids.copy()
        kept.ravel()[512:] = -1
        return kept


@mutant("writes 512 features at most", "many_changes")
class WritesFew(Verbs):
    def save(self, model: Any, directory: Any, features: Any = None, **options: Any) -> None:
        if features is None:
            features = model.state.config.registry.live[:512]
        super().save(model, directory, features, **options)


@mutant("trains the first 512 features alone", "many_changes")
class TrainsSome(AdamW):
    def step(self, gradients: Any) -> None:
        registry = self.layer.state.config.registry
        super().step({f: pair for f, pair in gradients.items() if registry.id(*f) < 512})


@mutant("looks tokens up by 16 bits", "wide_layers")
class NarrowTokens(Layer):
    def dense(self, x: Any) -> Any:
        return super().dense(x % 2**16 if x.dtype.kind == "i" else x)


@mutant("lets the first 65,536 inputs alone act", "wide_layers")
class ActsOnSome(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        some = x.copy()
        some[..., 2**16 :] = 0
        return super().active(some, ids, weights)


@mutant("merges into the first 65,536 inputs alone", "wide_layers")
class MergesSome(Primitives):
    def merged(self, model: Any, active: Any, update: Any) -> Any:
        def cut(path: str) -> Any:
            found = update(path).copy()
            found[:, 2**16 :] = 0
            return found

        return super().merged(model, active, cut)


@mutant("begins again with the initial values after 65,536 inputs", "wide_layers")
class RepeatsStart(Primitives):
    def attach(self, model: Any, config: Any, paths: Any, strategy: str, values: Any) -> Any:
        def again(path: str, shape: Any) -> Any:
            first = np.arange(shape.d_in) % 2**16
            return {f: (a[:, first], b) for f, (a, b) in values(path, shape).items()}

        return super().attach(model, config, paths, strategy, again)


@mutant("makes a kernel for each example", "no_kernel_each")
class KernelEach(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        y = super().__call__(x, ids, weights)
        each = np.zeros((len(x), *self.kernel.shape), self.dtype)
        for feature, s, a, b, rows, _, factor, _ in self.active(x, ids, weights):
            del feature, s
            each[rows] += factor.reshape(-1, 1, 1) * (b @ a).T
        return (
            x @ self.kernel + np.matmul(x, each) + (y - y) + (0 if self.bias is None else self.bias)
        )
