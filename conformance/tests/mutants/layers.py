"""Broken only in models of several layers, or in layers of another form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from flix_numpy import Layer, Primitives

from flix.backends.verbs import Verbs
from mutants._registry import OptionalHarness, OptionalPrimitives, mutant


@mutant("lets a target be the end of a name", "patterns")
class EndsOfNames(Verbs):
    def adapt(self, model: Any, config: Any, **options: Any) -> Any:
        targets = config.target_modules
        if not isinstance(targets, str):
            targets = f".*({'|'.join(targets)})".replace(".q", r"\.q")
        return super().adapt(model, replace(config, target_modules=targets), **options)


@mutant("lets a target be the beginning of a name", "patterns")
class BeginningsOfNames(Primitives):
    def attach(self, model: Any, config: Any, paths: Any, strategy: str, values: Any) -> Any:
        more = [path for path in model if path not in paths and path[:-1] in paths]
        return super().attach(model, config, [*paths, *more], strategy, values)


@mutant("leaves nothing out that is a target", "patterns")
class ExcludesNothing(Verbs):
    def adapt(self, model: Any, config: Any, **options: Any) -> Any:
        return super().adapt(model, replace(config, exclude_modules=()), **options)


@mutant("lets a pattern of ranks end in the middle of a name", "patterns")
class RanksInNames(Verbs):
    def adapt(self, model: Any, config: Any, **options: Any) -> Any:
        loose = {f"[a-z]*{key}": ranks for key, ranks in config.rank_pattern.items()}
        return super().adapt(model, replace(config, rank_pattern=loose), **options)


@mutant("lets the highest of the patterns of ranks that fit count", "patterns")
class HighestPattern(Verbs):
    def adapt(self, model: Any, config: Any, **options: Any) -> Any:
        ordered = sorted(config.rank_pattern.items(), key=lambda item: str(item[1]))[::-1]
        return super().adapt(model, replace(config, rank_pattern=dict(ordered)), **options)


@mutant("gives all layers one alpha", "patterns")
class OneAlpha(Verbs):
    def adapt(self, model: Any, config: Any, **options: Any) -> Any:
        return super().adapt(model, replace(config, alpha_pattern={}), **options)


@mutant("lets the last of the patterns of alphas that fit count", "patterns")
class LastAlpha(Verbs):
    def adapt(self, model: Any, config: Any, **options: Any) -> Any:
        turned = dict(reversed(config.alpha_pattern.items()))
        return super().adapt(model, replace(config, alpha_pattern=turned), **options)


@mutant("draws a layer's initial values by the last of its names", "patterns")
class DrawsByLastName(Primitives):
    def attach(self, model: Any, config: Any, paths: Any, strategy: str, values: Any) -> Any:
        first = {path.rpartition(".")[2]: path for path in reversed(paths)}

        def drawn(path: str, shape: Any) -> Any:
            own, other = values(path, shape), values(first[path.rpartition(".")[2]], shape)
            return {f: other.get(f, pair) for f, pair in own.items()}

        return super().attach(model, config, paths, strategy, drawn)


@mutant("gives every layer of one name the values of the last", "several_layers")
class SharesValues(Primitives):
    def read(self, model: Any, features: Any = None) -> Any:
        found = super().read(model, features)
        last = {(path.rpartition(".")[2], len(next(iter(p.values()))[0])): p for path, p in found.items()}  # fmt: skip
        return {
            path: last[path.rpartition(".")[2], len(next(iter(pairs.values()))[0])]
            for path, pairs in found.items()
        }


@mutant("writes files without the alphas that layers have of their own", "several_layers")
class WritesOneAlpha(Verbs):
    def save(self, model: Any, directory: Any, **options: Any) -> Any:
        config = model.state.config
        model.state.config = replace(config, alpha_pattern={})
        try:
            return super().save(model, directory, **options)
        finally:
            model.state.config = config


@mutant("trains the last layer alone", "several_layers")
class TrainsTheLast(OptionalHarness):
    def trainer(self, model: Any, settings: Any) -> Any:
        *others, _ = model.values()
        step = super().trainer(model, settings)

        def last(batch: Any) -> None:
            before = [dict(layer.pairs) for layer in others]
            step(batch)
            for layer, pairs in zip(others, before, strict=True):
                layer.pairs = pairs

        return last


@mutant("merges one layer's update into all of its name", "several_layers")
class MergesByName(OptionalPrimitives):
    def merged(self, model: Any, active: Any, update: Any) -> Any:
        first = {path.rpartition(".")[2]: path for path in reversed(model)}
        return super().merged(model, active, lambda path: update(first[path.rpartition(".")[2]]))


class Turned(Layer):
    """A layer that goes wrong in its other form alone, and there where its kernel is square."""

    form = ""

    @property
    def turned(self) -> bool:
        return self.form == "turned" and self.shape.d_in == self.shape.d_out


@mutant("takes a square kernel that stands the other way as it stands", "forms")
class SquareKernel(Turned):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        y = super().__call__(x, ids, weights)
        return y + x @ (self.kernel.T - self.kernel) if self.turned else y


@mutant("adds the update to a kernel that stands the other way", "forms")
class SquareUpdate(Turned):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        for feature, s, a, b, rows, entries, factor, h in super().active(x, ids, weights):
            if self.turned:
                a, b = b.T, a.T
                h = x[rows] @ a.T
            yield feature, s, a, b, rows, entries, factor, h


@mutant("numbers an input of two axes by its columns", "forms")
class ByColumns(Turned):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        if self.form == "turned":
            order = np.arange(x.shape[-1]).reshape(2, -1).T.ravel()
            x = x[..., order]
        return super().active(x, ids, weights)


@mutant("writes a square kernel's updates as they stand in memory", "forms")
class WritesTurned(Primitives):
    def read(self, model: Any, features: Any = None) -> Any:
        found = super().read(model, features)
        for path, pairs in found.items():
            if (
                getattr(model[path], "form", "") == "turned"
                and np.diff(model[path].kernel.shape) == 0
            ):
                found[path] = {f: (b.T.copy(), a.T.copy()) for f, (a, b) in pairs.items()}
        return found
