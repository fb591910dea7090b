"""Broken training in which something happens: no routing, another name, a removal, half precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flix_conformance.compare import bfloat16
from flix_numpy.conformance import AdamW, Harness

from mutants._registry import mutant


@mutant("takes a step without routing for one of the base", "trained_without_routing")
class TrainsTheBase(Harness):
    def trainer(self, model: Any, settings: Any) -> Any:
        step = super().trainer(model, settings)
        return lambda batch: None if batch.ids is None else step(batch)


@mutant("trains on under the last routing where a step has none", "trained_without_routing")
class TrainsOn(Harness):
    def trainer(self, model: Any, settings: Any) -> Any:
        step = super().trainer(model, settings)
        last: list[Any] = []

        def go_on(batch: Any) -> None:
            if batch.ids is None and last:
                batch = replace(batch, ids=last[-1].ids, weights=last[-1].weights)
            step(batch)
            last.append(batch)

        return go_on


@mutant("counts a step that it refuses", "trained_without_routing")
class CountsRefused(Harness):
    def trainer(self, model: Any, settings: Any) -> Any:
        optimizer = self.optimizer(*model.values(), settings)

        def step(batch: Any) -> None:
            for key, (m, v, t) in optimizer.moments.items():
                optimizer.moments[key] = m, v, t + (batch.ids is None)
            dy = (self.call(model, batch)[0] - batch.target) / len(batch.x)
            optimizer.step(self.gradients(model, batch, dy)["pairs"])

        return step


class KeyedState(AdamW):
    """Keeps its state by a key of its own."""

    def key(self, feature: Any) -> Any:
        raise NotImplementedError

    def step(self, gradients: Any) -> None:
        registry, kept = self.layer.state.config.registry, getattr(self, "kept", {})
        features = [f for f in registry.live if f in self.layer.pairs]
        found = {(registry.id(*f), p): kept.get((self.key(f), p)) for f in features for p in (0, 1)}
        self.moments = {key: state for key, state in found.items() if state is not None}
        super().step(gradients)
        own = {registry.id(*f): self.key(f) for f in features}
        self.kept = {(own[number], p): state for (number, p), state in self.moments.items()}


@mutant("keeps an optimizer's state by the features' names", "state_stays")
class ByName(KeyedState):
    def key(self, feature: Any) -> Any:
        return feature


@mutant("starts the state of a feature that thaws afresh", "state_stays")
class ThawsAfresh(AdamW):
    def step(self, gradients: Any) -> None:
        registry = self.layer.state.config.registry
        for feature in self.layer.state.frozen:
            for part in (0, 1):
                self.moments.pop((registry.id(*feature), part), None)
        super().step(gradients)


@mutant("counts the steps of a feature while it is frozen", "state_stays")
class CountsFrozen(AdamW):
    def step(self, gradients: Any) -> None:
        registry = self.layer.state.config.registry
        for feature in self.layer.state.frozen & gradients.keys():
            for part in (0, 1):
                m, v, t = self.moments[registry.id(*feature), part]
                self.moments[registry.id(*feature), part] = m, v, t + 1
        super().step(gradients)


@mutant(
    "keeps an optimizer's state by the features' places, which a removal moves",
    "state_after_removal",
)
class ByPlace(KeyedState):
    def key(self, feature: Any) -> Any:
        return sorted(self.layer.pairs).index(feature)


class Rounded(AdamW):
    """Rounds what it keeps to bfloat16."""

    def rounded(self, gradients: Any) -> Any:
        raise NotImplementedError

    def step(self, gradients: Any) -> None:
        super().step(gradients)
        for feature in self.rounded(gradients) & self.layer.pairs.keys():
            self.layer.pairs[feature] = [bfloat16(p) for p in self.layer.pairs[feature]]


@mutant("keeps what it trains in the layer's half precision", "trained_in_halves")
class RoundsTrained(Rounded):
    def rounded(self, gradients: Any) -> Any:
        return gradients.keys()


@mutant("rounds absent features to half precision", "trained_in_halves")
class RoundsAbsent(Rounded):
    def rounded(self, gradients: Any) -> Any:
        return self.layer.pairs.keys() - gradients.keys()
