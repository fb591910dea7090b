"""Broken in one strategy, one dtype, one mode, or for ids of one dtype: what is tried together must be tried apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from flix_numpy import Layer, current

from mutants._registry import AnyWay, OptionalHarness, SeveralWays, mutant


def broken_in(strategy: str, dtype: str | None = None) -> type[Layer]:
    """A layer that loses a part of its updates in one strategy, perhaps in one dtype alone."""

    class BrokenInOneWay(Layer):
        def active(self, x: Any, ids: Any, weights: Any) -> Any:
            for feature, s, a, b, rows, entries, factor, h in super().active(x, ids, weights):
                here = self.state.strategy == strategy and dtype in (None, self.dtype.name)
                lost = self.dtype.type(0.9 if here else 1)
                yield feature, s, a, b, rows, entries, lost * factor, lost * h

    return BrokenInOneWay


@mutant(
    "loses a tenth of the update in one strategy, in float32 alone", "forward", AnyWay, SeveralWays
)
class BrokenGather(broken_in("gather", "float32")):  # type: ignore[misc]
    pass


@mutant("trains wrongly in one strategy", "trajectory", AnyWay, SeveralWays)
class BrokenSingle(broken_in("single")):  # type: ignore[misc]
    pass


@mutant("takes ids of 64 bits for padding", "id_dtypes")
class NarrowIds(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if ids is not None and ids.dtype == np.int64:
            ids = np.full_like(ids, -1)
        return super().__call__(x, ids, weights)


@mutant("answers as the base in evaluation", "evaluation")
class BaseInEvaluation(OptionalHarness):
    def evaluated(self, model: Any, batch: Any) -> Any:
        with current.under(off=model.state):
            return self.call(model, batch)
