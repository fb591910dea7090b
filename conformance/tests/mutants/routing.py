"""Broken laws of composition, and bad input that is served."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from flix_numpy import Layer
from flix_numpy.conformance import Harness

import flix
from mutants._registry import ChangedFactors, mutant


@mutant("normalises a row's weights to a sum of 1", "linear_in_weights")
class Normalises(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if weights is not None:
            total = np.abs(weights).sum(-1, keepdims=True)
            weights = weights / np.where(total == 0, 1, total)
        return super().__call__(x, ids, weights)


@mutant("gives the first entry more say than the others", "permuted_features")
class FirstEntryMatters(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        weights = np.where(ids < 0, 0, 1).astype(np.float32) if weights is None else weights.copy()
        weights[..., :1] *= 1.25
        return super().__call__(x, ids, weights)


@mutant("routes every row as the batch's first", "permuted_rows")
class FirstRowForAll(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if len(ids) > 1:
            ids = np.repeat(ids[:1], len(ids), 0)
            weights = None if weights is None else np.repeat(weights[:1], len(ids), 0)
        return super().__call__(x, ids, weights)


@mutant("takes a weight of 0 for a small one", "inactive_is_absent")
class ZeroIsSmall(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if weights is not None:
            weights = np.where((weights == 0) & (ids >= 0), np.float32(0.01), weights)
        return super().__call__(x, ids, weights)


@mutant("adds a trace of features that no row lists", "inactive_is_absent")
class AbsentLeaks(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        y = super().__call__(x, ids, weights)
        return y + np.asarray(1e-3 * sum(b.sum() for _, b in self.pairs.values()), y.dtype)


@mutant("divides the update by the size of the batch", "split_batch")
class BatchMean(ChangedFactors):
    def factor(self, factor: Any, feature: Any, x: Any) -> Any:
        return factor / len(x)


@mutant("takes padding for the last feature", "padding")
class PaddingActs(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        last = len(self.state.config.registry) - 1
        super().__call__(x, ids, weights)
        return super().__call__(x, np.where(ids == -1, last, ids), weights)


@mutant("forgets the last entry", "padding")
class LastEntryLost(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        super().__call__(x, ids, weights)
        return super().__call__(x, ids[..., :-1], None if weights is None else weights[..., :-1])


@mutant("lets a feature that is listed twice act once", "listed_twice")
class TwiceIsOnce(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        super().__call__(x, ids, weights)
        same = (ids[..., :, None] == ids[..., None, :]) & np.tri(ids.shape[-1], k=-1, dtype=bool)
        return super().__call__(x, np.where(same.any(-1), -1, ids), weights)


@mutant("serves the base for ids of no feature", "unknown_ids")
class SkipsUnknownIds(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        known = (ids >= 0) & (ids < len(self.state.config.registry))
        return super().__call__(x, np.where(known, ids, -1), weights)


@mutant("clips ids into range", "unknown_ids")
class ClipsIds(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        return super().__call__(x, np.clip(ids, -1, len(self.state.config.registry) - 1), weights)


@mutant("refuses bad routing without saying where", "routing_refused")
class SaysNothing(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        try:
            return super().__call__(x, ids, weights)
        except ValueError:
            raise ValueError("bad routing") from None


@mutant("drops the ids of positions that there are not", "routing_refused")
class DropsPositions(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if ids.ndim == 3:
            ids = ids[:, : x.shape[1]]
            weights = None if weights is None else weights[:, : x.shape[1]]
        return super().__call__(x, ids, weights)


@mutant("cuts ids to 32 bits before it looks at them", "routing_refused")
class WrapsIds(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        ids = ids.astype(np.int32) if ids.dtype == np.int64 else ids
        return super().__call__(x, ids, weights)


@mutant("cuts weights to what float32 can hold", "routing_refused")
class CutsWeights(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if weights is not None and weights.dtype == np.float64:
            weights = np.clip(weights, -3e38, 3e38).astype(np.float32)
        return super().__call__(x, ids, weights)


@mutant("takes weights that are not finite for 0", "routing_refused")
class CleansWeights(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if weights is not None and weights.dtype.kind == "f":
            weights = np.nan_to_num(weights, posinf=0.0, neginf=0.0)
        return super().__call__(x, ids, weights)


def _encoded(config: Any, rows: Any, **options: Any) -> tuple[Any, Any]:
    routing = config.registry.encode(rows, **{"unknown": config.unknown, **options})
    return routing.ids, routing.weights


@mutant("leaves out what features imply", "encoding")
class ImpliesNothing(Harness):
    def encode(self, config: Any, rows: Any, **options: Any) -> Any:
        groups = {g: list(config.registry.names(g)) for g in config.registry.groups}
        return _encoded(replace(config, registry=flix.FeatureRegistry(groups)), rows, **options)


@mutant("implies one step far", "encoding")
class OneStep(Harness):
    def encode(self, config: Any, rows: Any, **options: Any) -> Any:
        said = config.to_dict()
        said["registry"]["implies"] = said["registry"]["implies"][:1]
        return _encoded(flix.FlixConfig.from_dict(said), rows, **options)


@mutant("gives every stand-in its full weight", "shares")
class FullShares(Harness):
    def encode(self, config: Any, rows: Any, **options: Any) -> Any:
        ids, weights = _encoded(config, rows, **options)
        return ids, np.ceil(weights) if options.get("unknown") == "mean" else weights


@mutant("weighs the groups of what a row names alone", "shares")
class NamedGroupsOnly(Harness):
    def encode(self, config: Any, rows: Any, **options: Any) -> Any:
        factors = options.get("group_weights") or {}
        named = {group for row in rows for group in row}
        kept = {group: factor for group, factor in factors.items() if group in named}
        return _encoded(config, rows, **{**options, "group_weights": kept})


@mutant("gives every fallback its full weight", "fallbacks")
class FullFallbacks(Harness):
    def encode(self, config: Any, rows: Any, **options: Any) -> Any:
        told = options.get("unknown")
        if isinstance(told, dict):
            ((odd, known),) = told.items()
            names = [known] if isinstance(known, str) else known
            rows = [{g: dict.fromkeys(names, own[odd]) for g, own in row.items()} for row in rows]
        return _encoded(config, rows, **options)


@mutant("lets fallbacks imply nothing", "fallbacks")
class FallbacksAlone(Harness):
    def encode(self, config: Any, rows: Any, **options: Any) -> Any:
        if isinstance(options.get("unknown"), dict):
            config = replace(config, registry=config.registry.with_implications({}))
        return _encoded(config, rows, **options)


@mutant("lets a name that is listed twice act once", "encoding")
class NamesOnce(Harness):
    def encode(self, config: Any, rows: Any, **options: Any) -> Any:
        once = [
            {g: list(dict.fromkeys(v)) if isinstance(v, list) else v for g, v in row.items()}
            for row in rows
        ]
        return _encoded(config, once, **options)


@mutant("skips unknown names although it was told to refuse them", "names_refused")
class SkipsUnknownNames(Harness):
    def encode(self, config: Any, rows: Any, **options: Any) -> Any:
        return _encoded(config, rows, **{**options, "unknown": "skip"})


@mutant("refuses unknown names without saying which row", "names_refused")
class NamesNoRow(Harness):
    def encode(self, config: Any, rows: Any, **options: Any) -> Any:
        try:
            return _encoded(config, rows, **options)
        except ValueError as error:
            raise ValueError(re.sub(r"row \d+: ", "", str(error))) from None
