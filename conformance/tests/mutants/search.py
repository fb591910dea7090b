"""Broken in the search for weights alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from flix.core.features.search import SearchSpace, descended, evolved
from mutants._registry import OPTIONAL, OptionalHarness, OptionalPrimitives, mutant


class Harness(OptionalHarness):
    """The example's, with a search."""

    def search(
        self, model: Any, batch: Any, row: Any, *, groups: Any, method: str, l1: float, steps: int
    ) -> Any:
        registry, rows = model.state.config.registry, len(batch.x)
        space = SearchSpace(registry, row, groups)
        (layer,) = model.values()

        def sloped(weights: Any) -> Any:
            given = space.routing(weights, rows)
            off = layer(batch.x, given.ids, given.weights) - batch.target
            _, slope, _ = layer.backward(batch.x, given.ids, given.weights, off / rows)
            return float((off**2).sum() / (2 * rows)), slope.sum(0)

        if method == "gradient":
            return descended(sloped, space, steps=steps, l1=l1)
        return evolved(lambda weights: sloped(weights)[0], space, steps=steps, l1=l1)


OPTIONAL["search"] = (OptionalPrimitives, Harness)


@mutant("searches the weights that were to stay", "searched")
class SearchesAll(Harness):
    def search(self, model: Any, batch: Any, row: Any, *, groups: Any, **options: Any) -> Any:
        return super().search(model, batch, row, groups=None, **options)


@mutant("says the loss of a row that is another", "searched")
class OtherLoss(Harness):
    def search(self, model: Any, batch: Any, row: Any, **options: Any) -> Any:
        found = super().search(model, batch, row, **options)
        return replace(found, loss=found.loss / 2)


@mutant("stops a search at its second step", "searched")
class StopsEarly(Harness):
    def search(self, model: Any, batch: Any, row: Any, *, steps: int, **options: Any) -> Any:
        return super().search(model, batch, row, steps=2, **options)


@mutant("folds what it found into the features", "searched")
class FoldsIn(Harness):
    def search(self, model: Any, batch: Any, row: Any, **options: Any) -> Any:
        found = super().search(model, batch, row, **options)
        (layer,) = model.values()
        for group, own in found.row.items():
            for name, weight in own.items():
                if (group, name) in layer.pairs:
                    a, b = layer.pairs[group, name]
                    layer.pairs[group, name] = [a, np.asarray(weight * b, b.dtype)]
        return found
