"""Deliberately broken backends, made from the example: each breaks one rule, and names the checks that must see it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import flix_numpy
from flix_conformance import Backend
from flix_conformance.checks import CHECKS
from flix_conformance.compare import bfloat16
from flix_numpy import Counts, Layer, Primitives
from flix_numpy.conformance import AdamW, Harness

from flix.backends import messages
from flix.backends.verbs import Verbs
from flix.core.adapter.described import Head
from flix.core.adapter.heads import Place
from flix.core.peft.exporting import PeftFacts
from flix.core.strategy.union import first_unlike

VERBS = [name for name in vars(flix_numpy) if callable(getattr(Verbs, name, None))]
OPTIONAL_VERBS = ("merge_in_place", "unmerge", "export_peft")
PARTS = (Layer, AdamW, Primitives, Verbs, Harness)


def made(name: str, *parts: type[Any]) -> Backend:
    """The example backend with other classes in place of its own."""
    chosen = {part: next((p for p in parts if issubclass(p, part)), part) for part in PARTS}
    primitives = chosen[Primitives]()
    verbs = chosen[Verbs](primitives)
    public = {verb: getattr(verbs, verb) for verb in VERBS}
    if issubclass(chosen[Primitives], OptionalPrimitives):
        public |= {verb: getattr(verbs, verb) for verb in OPTIONAL_VERBS}
    harness = type("Harness", (chosen[Harness],), {})()
    harness.layer, harness.optimizer = chosen[Layer], chosen[AdamW]
    return Backend(name, SimpleNamespace(primitives=primitives, **public), harness)


class OptionalPrimitives(Primitives):
    """The example's, with what primitives may have besides, and a base whose kernels can train."""

    def count(self, model: Any) -> Counts:
        trained = (x.kernel.size for x in model.values() if getattr(x, "trains", False))
        return Counts(super().count(model).total, sum(trained))

    def fold(self, model: Any, row: Any, update: Any) -> None:
        model.state.folded = dict(row)
        for path in self.shapes(model):
            layer = model[path]
            layer.own = layer.kernel
            layer.kernel = (layer.kernel + update(path).T).astype(layer.dtype)

    def folded(self, model: Any) -> Any:
        return getattr(model.state, "folded", None)

    def unfold(self, model: Any) -> None:
        model.state.folded = None
        for path in self.shapes(model):
            model[path].kernel = model[path].own

    def peft_facts(self, model: Any) -> PeftFacts:
        return PeftFacts([*self.shapes(model)], "Model", {})

    def head_places(self, model: Any) -> Any:
        adapted = model.state is not None
        return {f"{p}.kernel": Place(x.kernel.shape, [p] if adapted and x.state else []) for p, x in model.items()}  # fmt: skip

    def heads(self, model: Any, names: Any = None) -> Any:
        if names is not None:
            for name in names:
                model[name.removesuffix(".kernel")].trains = True
        trained = {p: x for p, x in model.items() if getattr(x, "trains", False)}
        return {f"{p}.kernel": Head.of(x.kernel) for p, x in trained.items()}

    def put_heads(self, model: Any, heads: Any) -> Any:
        for name, head in heads.items():
            layer = model[name.removesuffix(".kernel")]
            layer.kernel, layer.trains = head.array().astype(layer.dtype), True
        return model

    def base_name(self, model: Any) -> tuple[None, None]:
        return None, None

    def kernel_samples(self, model: Any, places: Any) -> Any:
        held = {p: getattr(model[p], "own", model[p].kernel).T for p in places}
        return {p: held[p][at.rows, at.columns] for p, at in places.items()}


class FoldingLayer(Layer):
    """The example's, which takes no routing while a composition is folded in."""

    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        folded = getattr(self.state, "folded", None)
        if folded is None:
            yield from super().active(x, ids, weights)
        elif ids is not None:
            raise messages.folded_in(folded)


class OptionalHarness(Harness):
    """The example's, with what a harness may have besides."""

    nested = True
    forms: tuple[str, ...] = ("turned",)

    def plain(self, layers: Any, x: Any) -> Any:
        """A layer's form is a word on it, which those that are broken heed."""
        model = super().plain(layers, x)
        for layer in layers:
            model[layer.path].form = layer.form
        return model

    def trainer(self, model: Any, settings: Any) -> Any:
        if len(model) == 1:
            return super().trainer(model, settings)
        optimizers = [self.optimizer(layer, settings) for layer in model.values()]

        def step(batch: Any) -> None:
            given, y = [], batch.x
            for layer in model.values():
                given.append(y)
                y = layer(y, batch.ids, batch.weights)
            dy = (y - batch.target) / len(batch.x)
            for layer, x, optimizer in [*zip(model.values(), given, optimizers, strict=True)][::-1]:
                dy, _, pairs = layer.backward(x, batch.ids, batch.weights, dy)
                optimizer.step(pairs)

        return step

    def unfreeze(self, model: Any, path: str) -> None:
        model[path].trains = True

    def evaluated(self, model: Any, batch: Any) -> Any:
        return self.call(model, batch)

    def compiled_forward(self, model: Any) -> Any:
        return lambda batch: self.call(model, batch)

    def fit(self, model: Any, batches: Any, settings: Any) -> None:
        step = self.trainer(model, settings)
        for batch in batches:
            step(batch)

    def largest(self, model: Any, batch: Any, dy: Any) -> int:
        """All that is held at once, by numpy's own account."""
        tracemalloc.start()
        try:
            self.call(model, batch)
            self.gradients(model, batch, dy)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def ways(self) -> Any:
        return {"again": self.call}

    def loops(self) -> Any:
        return {"again": self.fit}


class Halves(Harness):
    """The example's, with layers that hold what bfloat16 has, and answer in it; numpy has no such dtype."""

    dtypes = ("float32", "float64", "bfloat16")

    def plain(self, layers: Any, x: Any) -> Any:
        held = {"bfloat16": "float32"}
        model = super().plain([replace(p, dtype=held.get(p.dtype, p.dtype)) for p in layers], x)
        model.halves = layers[0].dtype == "bfloat16"
        return model

    def call(self, model: Any, batch: Any, path: Any = None) -> Any:
        y, dtype = super().call(model, batch, path)
        return (bfloat16(y), "bfloat16") if model.halves else (y, dtype)


class SeveralWays(Harness):
    """The example's, under several names of strategies, which its layers can look up."""

    strategies = ("auto", "gather", "masked", "single")


class AnyWay(Primitives):
    """The example's; the state knows how the model was told to compute."""

    def attach(self, model: Any, config: Any, paths: Any, strategy: str, values: Any) -> Any:
        model = super().attach(model, config, paths, "auto", values)
        model.state.strategy = strategy
        return model


class LikeRows(Layer):
    """The example's, which takes rows that differ in no strategy of the name "single"."""

    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if self.state is not None and self.state.strategy == "single":
            place = first_unlike(ids, weights)
            if place is not None:
                raise messages.rows_differ(place)
        return super().__call__(x, ids, weights)


OPTIONAL: dict[str, tuple[type[Any], ...]] = {
    "needs": (OptionalPrimitives, OptionalHarness, FoldingLayer),
    "strategy": (AnyWay, SeveralWays, LikeRows),
    "dtype": (Halves,),
}


def optional(check: str) -> tuple[type[Any], ...]:
    """What a check needs in place of the example's own."""
    if needs := CHECKS[check].needs:
        return OPTIONAL[next((name for name in needs if name in OPTIONAL), "needs")]
    if CHECKS[check].dtype is not None:
        return OPTIONAL["dtype"]
    return OPTIONAL["strategy"] if CHECKS[check].strategy != "auto" else ()


@dataclass(frozen=True)
class Mutant:
    """A broken backend.

    Attributes:
        name: what is wrong, in words.
        check: the check that must catch it.
        part: the broken class, of a layer, the optimizer, the primitives, the verbs or the harness.
        beside: classes that it needs in place of the example's.
    """

    name: str
    check: str
    part: type[Any]
    beside: tuple[type[Any], ...] = ()

    def backend(self) -> Backend:
        """The backend that the kit gets."""
        return made("mutant", self.part, *self.beside, *optional(self.check))


MUTANTS: list[Mutant] = []


def mutant(name: str, check: str, *beside: type[Any]) -> Callable[[type[Any]], type[Any]]:
    """Register a broken class."""

    def register(cls: type[Any]) -> type[Any]:
        MUTANTS.append(Mutant(name, check, cls, beside))
        return cls

    return register


class ChangedGradients(Layer):
    """A layer whose pairs' gradients are changed."""

    def change(self, feature: Any, a: Any, b: Any, x: Any) -> Any:
        raise NotImplementedError

    def backward(self, x: Any, ids: Any, weights: Any, dy: Any) -> Any:
        dx, d_weights, pairs = super().backward(x, ids, weights, dy)
        return dx, d_weights, {f: self.change(f, a, b, x) for f, (a, b) in pairs.items()}


class ChangedFactors(Layer):
    """A layer whose features act with other factors, w s."""

    def factor(self, factor: Any, feature: Any, x: Any) -> Any:
        raise NotImplementedError

    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        for feature, s, a, b, rows, entries, factor, h in super().active(x, ids, weights):
            yield feature, s, a, b, rows, entries, self.factor(factor, feature, x), h


class ChangedPairs:
    """What changes the values of a model of one layer, for verbs and primitives."""

    def change_pairs(self, model: Any, change: Callable[[Any, Any, Any], Any]) -> None:
        (layer,) = model.values()
        layer.pairs = {f: change(f, *pair) for f, pair in layer.pairs.items()}
