"""Broken where the formula says nothing: heads, the base alone, what is counted, what verbs take and return."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from threading import local
from typing import Any

import numpy as np
from flix_numpy import Counts, Layer, LayerInfo, Primitives, current
from flix_numpy.conformance import Harness

import flix
from flix.backends.verbs import Verbs
from mutants._registry import mutant


def flix_head(path: str) -> bool:
    """Whether the example itself takes a layer for a head."""
    return Primitives().layers({path: Layer(path, np.zeros((1, 1)))})[0].head


class ChangedHeads(Primitives):
    """Other layers pass for heads."""

    def is_head(self, path: str, model: Any) -> bool:
        raise NotImplementedError

    def layers(self, model: Any) -> list[LayerInfo]:
        return [replace(i, head=self.is_head(i.path, model)) for i in super().layers(model)]


@mutant("knows no heads", "heads")
class NoHeads(ChangedHeads):
    def is_head(self, path: str, model: Any) -> bool:
        return False


@mutant("knows heads by a list of its own", "heads")
class OwnHeads(ChangedHeads):
    def is_head(self, path: str, model: Any) -> bool:
        return path in ("lm_head", "classifier", "score", "logits")


@mutant("takes every name with 'head' in it for a head", "heads")
class AnyHead(ChangedHeads):
    def is_head(self, path: str, model: Any) -> bool:
        return "head" in path or flix_head(path)


@mutant("never adapts a head, though it is named", "heads")
class RefusesHeads(Primitives):
    def attach(self, model: Any, config: Any, paths: Any, strategy: str, values: Any) -> Any:
        chosen = [path for path in paths if not flix_head(path)]
        return super().attach(model, config, chosen or paths, strategy, values)


@mutant("adapts what is excluded", "heads")
class ForgetsExclusions(Verbs):
    def adapt(self, model: Any, config: Any, **options: Any) -> Any:
        return super().adapt(model, replace(config, exclude_modules=()), **options)


@mutant("takes the last layer for the head", "cross_heads")
class LastIsHead(ChangedHeads):
    def is_head(self, path: str, model: Any) -> bool:
        return path == list(model)[-1]


@mutant("lets explicit features act inside disable", "disabled")
class ExplicitWins(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        with nullcontext() if ids is None else current.resumed(()):
            yield from super().active(x, ids, weights)


@mutant("looks at routing inside disable, and refuses it", "disabled")
class LooksAtRouting(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        if (
            self.state is not None
            and ids is not None
            and (ids >= len(self.state.config.registry)).any()
        ):
            raise flix.RoutingError("an id of no feature")
        return super().active(x, ids, weights)


@mutant("ends disable with the first of two contexts that ends", "disabled")
class EndsEarly(Primitives):
    def switch(self, model: Any, by: int) -> None:
        super().switch(model, by)
        while by < 0 and current.is_off(model.state):
            super().switch(model, by)


@mutant("disables the model, but no layer that is called by hand", "disabled")
class InsideGoesOn(Harness):
    def call(self, model: Any, batch: Any, path: Any = None) -> Any:
        if path is None or not current.is_off(model.state) or batch.ids is None:
            return super().call(model, batch, path)
        ids = batch.ids % len(model.state.config.registry)
        with current.resumed(()):
            return super().call(model, replace(batch, ids=ids), path)


@mutant("stays disabled after an error", "disabled")
class StaysOff(Verbs):
    def disable(self, model: Any) -> Any:
        @contextmanager
        def context() -> Any:
            self.primitives.switch(model, 1)
            yield
            self.primitives.switch(model, -1)

        return context()


class ByThread(local):
    """A count of each thread."""

    count = 0

    def __bool__(self) -> bool:
        return self.count > 0


class OffForAll(Layer):
    """The example's, which goes by a count on the state, too."""

    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        off = self.state is not None and getattr(self.state, "off", None)
        return () if off else super().active(x, ids, weights)


@mutant("disables a model for all threads", "disabled_here", OffForAll)
class DisablesThreads(Primitives):
    def switch(self, model: Any, by: int) -> None:
        model.state.off = getattr(model.state, "off", 0) + by


@mutant("disables a model for all tasks of a thread", "disabled_here", OffForAll)
class DisablesTasks(Primitives):
    def switch(self, model: Any, by: int) -> None:
        if not isinstance(getattr(model.state, "off", None), ByThread):
            model.state.off = ByThread()
        model.state.off.count += by


@mutant("leaves a trace of the features inside disable", "cross_disabled")
class Trace(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        y = super().__call__(x, ids, weights)
        if self.state is not None and current.is_off(self.state):
            y = y + 0.01 * sum(b.sum() for _, b in self.pairs.values())
        return y


@mutant("serves the base where weights come without features", "weights_alone")
class BaseForWeights(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if ids is not None or weights is None or self.state is None:
            return super().__call__(x, ids, weights)
        with current.under(off=self.state):
            return super().__call__(x)


@mutant("lets a layer that is called by hand take weights without features", "weights_alone")
class InsideTakesWeights(Harness):
    def call(self, model: Any, batch: Any, path: Any = None) -> Any:
        if path is not None and batch.ids is None:
            return self.plain_call(model, batch, path)
        return super().call(model, batch, path)

    def plain_call(self, model: Any, batch: Any, path: str) -> Any:
        layer = model[path]
        return Layer(path, layer.kernel, layer.bias)(batch.x), "float32"


@mutant("says of weights without features that routing is missing", "weights_alone")
class SaysUnrouted(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        return super().active(x, ids, None if ids is None else weights)


@mutant("refuses weights without features in words of its own", "cross_refusals")
class OwnWords(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        if self.state is not None and not current.is_off(self.state) and ids is None:
            raise flix.RoutingError("flix_weights needs flix_features")
        return super().active(x, ids, weights)


@mutant("returns nothing from renaming", "returned")
class ReturnsNothing(Verbs):
    def rename_feature(self, model: Any, group: str, name: str, new: str) -> Any:
        super().rename_feature(model, group, name, new)


@mutant("returns the features that came in instead of the model", "returned")
class ReturnsFeatures(Verbs):
    def load_features(self, model: Any, source: Any, features: Any = None, **options: Any) -> Any:
        before = set(model.state.config.registry.live)
        super().load_features(model, source, features, **options)
        return tuple(set(model.state.config.registry.live) - before)


@mutant("returns a copy of the model that it changed", "returned")
class ReturnsCopy(Verbs):
    def freeze(self, model: Any, features: Any) -> Any:
        return deepcopy(super().freeze(model, features))


@mutant("returns a copy of the model that a file was loaded into", "returned")
class LoadsCopy(Verbs):
    def load(
        self, model: Any, directory: Any, rename: Any = None, *, strategy: str = "auto"
    ) -> Any:
        return deepcopy(super().load(model, directory, rename, strategy=strategy))


@mutant("forgets under a new name that a feature was frozen", "returned")
class RenameThaws(Primitives):
    def change(self, model: Any, change: Any) -> Any:
        frozen = set(model.state.frozen)
        model = super().change(model, change)
        model.state.frozen &= frozen
        return model


@mutant("starts over where a file is loaded into an adapted model", "cross_life")
class LoadsNowhere(Verbs):
    def load(
        self, model: Any, directory: Any, rename: Any = None, *, strategy: str = "auto"
    ) -> Any:
        flix.load_adapter(directory, rename)
        return model


class ChangedSummary(Verbs):
    """Counts otherwise."""

    def changed(self, found: Any, model: Any) -> Any:
        raise NotImplementedError

    def summary(self, model: Any) -> Any:
        return self.changed(super().summary(model), model)


@mutant("counts removed features", "counts")
class CountsRemoved(ChangedSummary):
    def changed(self, found: Any, model: Any) -> Any:
        removed = dict.fromkeys(model.state.config.registry.removed, 0)
        return replace(found, features={**found.features, **removed})


@mutant("counts frozen features among those that train", "counts")
class CountsFrozen(ChangedSummary):
    def changed(self, found: Any, model: Any) -> Any:
        return replace(found, trainable=sum(found.features.values()))


@mutant("leaves frozen features out of the total", "counts")
class FrozenNowhere(ChangedSummary):
    def changed(self, found: Any, model: Any) -> Any:
        frozen = sum(found.features[f] for f in model.state.frozen)
        return replace(found, total=found.total - frozen)


@mutant("counts heads among what trains", "counts")
class HeadsTrain(Primitives):
    def count(self, model: Any) -> Counts:
        heads = [info.path for info in self.layers(model) if info.head]
        return Counts(super().count(model).total, sum(model[path].kernel.size for path in heads))


@mutant("counts all that trains among the features", "trained_heads")
class HeadsAreFeatures(ChangedSummary):
    def changed(self, found: Any, model: Any) -> Any:
        beside = found.trainable - sum(found.features.values())
        first = next(iter(found.features))
        return replace(found, features={**found.features, first: found.features[first] + beside})


@mutant("takes the whole base for frozen, whatever was unfrozen", "trained_heads")
class BaseNeverTrains(Primitives):
    def count(self, model: Any) -> Counts:
        return Counts(super().count(model).total)


@mutant("counts the adapted layers alone", "counts")
class NoOthers(Primitives):
    def count(self, model: Any) -> Counts:
        return Counts(sum(model[path].kernel.size for path in self.shapes(model)))


@mutant("counts a feature's rank in layers where it has none", "cross_counts")
class EveryLayer(ChangedSummary):
    def changed(self, found: Any, model: Any) -> Any:
        ranks, layers = model.state.config.ranks, self.primitives.shapes(model).values()
        sizes = {f: sum(ranks[f] * (s.d_in + s.d_out) for s in layers) for f in found.features}
        return replace(found, features=sizes)


@mutant("calls an argument otherwise", "verbs")
class OtherName(Verbs):
    def rename_feature(self, model: Any, group: str, old: str, new: str) -> Any:
        return super().rename_feature(model, group, old, new)


@mutant("has another default", "verbs")
class OtherDefault(Verbs):
    def load_features(
        self,
        model: Any,
        source: Any,
        features: Any = None,
        *,
        conflicts: str = "keep",
        rename: Any = None,
        freeze_others: bool = False,
    ) -> Any:
        return super().load_features(
            model, source, features, conflicts=conflicts, rename=rename, freeze_others=freeze_others
        )


@mutant("lacks a verb", "verbs")
class LacksThaw(Verbs):
    thaw: Any = None


@mutant("takes an option by name that others take by place", "cross_verbs")
class ByName(Verbs):
    def save(self, model: Any, directory: Any, *, features: Any = None) -> None:
        super().save(model, directory, features)
