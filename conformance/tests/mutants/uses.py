"""Broken only when one model is used for long: what is kept from one call is served in another."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
from flix_numpy import Layer, current
from flix_numpy.conformance import Harness

from mutants._registry import OptionalHarness, mutant


@mutant("knows routing again by the array that it stands in", "many_calls")
class KeepsRouting(Layer):
    seen: Any = None

    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if self.seen is None or self.seen[0] is not ids:
            self.seen = ids, ids.copy(), None if weights is None else weights.copy()
        return super().__call__(x, *self.seen[1:])


@mutant("keeps the pairs of its first call", "many_calls")
class KeepsPairs(Layer):
    kept: Any = None

    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        self.kept = self.kept or dict(self.pairs)
        now, self.pairs = self.pairs, self.kept
        try:
            return super().__call__(x, ids, weights)
        finally:
            self.pairs = now


@mutant("keeps the pairs of its first evaluation", "many_calls")
class EvaluatesTheFirst(OptionalHarness):
    def evaluated(self, model: Any, batch: Any) -> Any:
        if not hasattr(model, "evaluates"):
            model.evaluates = deepcopy(model)
        return self.call(model.evaluates, batch)


@mutant("answers a single position as the last of the call before", "one_by_one")
class KeepsTheLast(Layer):
    long: Any = None

    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        y = super().__call__(x, ids, weights)
        if y.ndim == 3 and y.shape[1] > 1:
            self.long = y
        elif y.ndim == 3 and self.long is not None and len(self.long) == len(y):
            return self.long[:, -1:]
        return y


@mutant("takes the first of ids that are too many, in evaluation", "one_by_one")
class TakesTheFirst(OptionalHarness):
    def evaluated(self, model: Any, batch: Any) -> Any:
        if batch.ids.ndim == 3:
            count = batch.x.shape[1]
            weights = None if batch.weights is None else batch.weights[:, :count]
            batch = replace(batch, ids=batch.ids[:, :count], weights=weights)
        return self.call(model, batch)


@mutant("takes the last positions of ids that are too many", "one_by_one")
class CutsIds(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if ids.ndim == 3 and x.shape[1] == 1:
            ids, weights = ids[:, -1:], None if weights is None else weights[:, -1:]
        return super().__call__(x, ids, weights)


@mutant("keeps routing on the model while it runs", "threads")
class SharesRouting(Harness):
    def call(self, model: Any, batch: Any, path: Any = None) -> Any:
        model.shared = batch
        time.sleep(0.002)
        return super().call(model, replace(batch, ids=model.shared.ids), path)


@mutant("compiles the first call's ids in", "compiled")
class BakesIds(OptionalHarness):
    def compiled_forward(self, model: Any) -> Any:
        first: list[Any] = []

        def run(batch: Any) -> Any:
            first.append(batch)
            return self.call(model, replace(batch, ids=first[0].ids, weights=first[0].weights))

        return run


@mutant("compiles the values of its first call in", "compiled")
class BakesValues(OptionalHarness):
    def compiled_forward(self, model: Any) -> Any:
        frozen = deepcopy(model)
        return lambda batch: self.call(frozen, batch)


@mutant("compiles in whether the model is disabled", "compiled")
class BakesSwitch(OptionalHarness):
    def compiled_forward(self, model: Any) -> Any:
        def run(batch: Any) -> Any:
            with current.resumed(()):
                return self.call(model, batch)

        return run


@mutant("serves the base for unknown ids where it is compiled", "compiled")
class CompilesNoChecks(OptionalHarness):
    def compiled_forward(self, model: Any) -> Any:
        def run(batch: Any) -> Any:
            known = (batch.ids >= 0) & (batch.ids < len(model.state.config.registry))
            return self.call(model, replace(batch, ids=np.where(known, batch.ids, -1)))

        return run


@mutant("lets the framework's own loop decay what is absent", "fitted")
class FitDecays(OptionalHarness):
    def fit(self, model: Any, batches: Any, settings: Any) -> None:
        super().fit(model, batches, settings)
        (layer,) = model.values()
        layer.pairs = {f: [p * p.dtype.type(1 - 1e-6) for p in v] for f, v in layer.pairs.items()}


@mutant("gives the framework's own loop the first batch's routing", "fitted")
class FitRoutesOnce(OptionalHarness):
    def fit(self, model: Any, batches: Any, settings: Any) -> None:
        first = batches[0]
        same = [replace(b, ids=first.ids, weights=first.weights) for b in batches]
        super().fit(model, same, settings)


@mutant("forgets the features in its copies", "other_ways")
class CopiesTheBase(OptionalHarness):
    def ways(self) -> Any:
        def copied(model: Any, batch: Any) -> Any:
            twin = deepcopy(model)
            for layer in twin.values():
                layer.pairs = {}
            return self.call(twin, batch)

        return {"copied": copied}


@mutant("leaves its model changed by another way to call it", "other_ways")
class SpoilsModels(OptionalHarness):
    def ways(self) -> Any:
        def spoiled(model: Any, batch: Any) -> Any:
            y = self.call(model, batch)
            for layer in model.values():
                layer.pairs = {f: [a, -b] for f, (a, b) in layer.pairs.items()}
            return y

        return {"paged": spoiled}


@mutant("takes steps that another loop does not count", "other_loops")
class LoopsTwice(OptionalHarness):
    def loops(self) -> Any:
        return {"twice": lambda m, batches, s: self.fit(m, [*batches, batches[-1]], s)}


@mutant("keeps the scales of a layer for all that have its path and ranks", "two_models")
class SharesScales(Layer):
    kept: Any = {}  # noqa: RUF012 - that is what is wrong

    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        for feature, s, a, b, rows, entries, factor, h in super().active(x, ids, weights):
            first = self.kept.setdefault((self.path, feature, a.shape, b.shape), s)
            yield feature, first, a, b, rows, entries, factor * a.dtype.type(first / s), h


@mutant("keeps a batch's factors for all layers", "layers_apart")
class SharesFactors(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        kept = vars(self.state).setdefault("kept", {})
        for feature, s, a, b, rows, entries, factor, h in super().active(x, ids, weights):
            yield feature, s, a, b, rows, entries, kept.setdefault((feature, id(ids)), factor), h
