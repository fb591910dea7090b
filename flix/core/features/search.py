"""Weights of a combination that nobody trained, found from some dozens of its examples.

A composition is a sum (docs/specification.md §1.1), so a new combination, or a language that has no feature, may be
served by weighted features of others. Which weights are best is asked of examples: without gradients, by an evolution
strategy, as LoRAHub does with whole LoRAs (Huang et al. 2023, arXiv 2307.13269, §3.3; the penalty on the weights' size
is from there, too), or with the gradient of the weights, where a framework gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.checks import finite, whole
from flix.core.errors import ConfigError, FeatureError, listed, shown
from flix.core.features.encoding import Row, Unknown, encode
from flix.core.features.names import Feature, normal_group
from flix.core.features.registry import FeatureRegistry
from flix.core.features.routing import Routing

LARGEST = 1.5
"""Weights are kept between minus this and this, as LoRAHub keeps them."""

_SMALL = 0.01

Weights = NDArray[np.float64]
Loss = Callable[[Weights], float]
Gradient = Callable[[Weights], tuple[float, Weights]]
BatchLoss = Callable[[Any, Mapping[str, Any]], Any]
"""The loss of a model's outputs for a batch, a scalar of the framework."""
Ask = Callable[[Mapping[str, Any], NDArray[Any], NDArray[Any], bool], tuple[float, Weights | None]]
"""Of a batch, ids and weights ``[N, W]``, and whether the slope is wanted: the loss, and its slope ``[N, W]``."""


@dataclass(frozen=True)
class SearchedWeights:
    """What a search found.

    Attributes:
        row: the composition, as ``encode``, ``merge`` and ``export_peft`` take it. It also names the features that it
            implies, so that encoding adds none.
        loss: the mean loss of the examples under it.
        before: the loss of the given row.
        history: the best loss after each step.
    """

    row: dict[str, dict[str, float]]
    loss: float
    before: float
    history: tuple[float, ...]


class SearchSpace:
    """The features whose weights are searched, and those whose weights stay.

    Args:
        registry: the features.
        row: what is known of the combination; the search starts there.
        groups: the groups whose features are all tried; default: every group of the registry. What the row activates in
            other groups keeps its weight.
        unknown: as for ``encode``: ``"skip"`` for a row that names a language without a feature.

    Raises:
        FeatureError: an unknown group, or groups without a feature.
        FeatureError, RoutingError: a row that cannot be encoded.

    Attributes:
        ids: of all features that may act.
        start: their weights in the row given.
        free: which of them are searched.
    """

    def __init__(
        self,
        registry: FeatureRegistry,
        row: Row,
        groups: Collection[str] | None = None,
        unknown: Unknown = "error",
    ) -> None:
        if isinstance(groups, str):
            raise ConfigError(
                f"groups is a list of groups, got {shown(groups)}; write [{groups!r}]"
            )
        self.registry = registry
        chosen = {normal_group(g) for g in (registry.groups if groups is None else groups)}
        for group in chosen:
            registry.ids_of(group)
        given = encode(registry, [row], unknown=unknown).names(0)
        tried = [feature for feature in registry.live if feature[0] in chosen]
        if not tried:
            raise FeatureError(
                f"there is nothing to search: {listed(sorted(chosen))} have no feature"
            )
        known: list[Feature] = list(dict.fromkeys([*given, *tried]))
        self.features = known
        self.ids = np.array([registry.id(*feature) for feature in known], np.int32)
        self.start = np.array([given.get(feature, 0.0) for feature in known], np.float64)
        self.free = np.array([feature[0] in chosen for feature in known])

    def routing(self, weights: Weights, rows: int) -> Routing:
        """The same composition for so many rows; features of weight 0 are in it."""
        ids = np.broadcast_to(self.ids, (rows, len(self.ids)))
        return Routing(
            ids, np.broadcast_to(np.asarray(weights, np.float32), ids.shape), self.registry
        )

    def row(self, weights: Weights) -> dict[str, dict[str, float]]:
        """Weights as a row. Weights near 0 are left out, but for features that others would bring along."""
        found = {
            f: float(w) for f, w in zip(self.features, weights, strict=True) if abs(w) >= _SMALL
        }
        named = {
            self.registry.features[i]
            for f in found
            for i in self.registry.implied(self.registry.id(*f))
        }
        row: dict[str, dict[str, float]] = {}
        for group, name in [*found, *sorted(named - set(found))]:
            row.setdefault(group, {})[name] = found.get((group, name), 0.0)
        return row


def evolved(
    loss: Loss, space: SearchSpace, *, steps: int = 40, l1: float = 0.05, seed: int = 0
) -> SearchedWeights:
    """Search by an evolution strategy: a separable CMA-ES (Ros and Hansen 2008), which asks for losses alone.

    Args:
        loss: the mean loss of the examples under weights of the space's features.
        space: what is searched.
        steps: generations; each asks for 4 + 3 ln(n) losses, n being the number of weights.
        l1: the price of the mean absolute weight.
        seed: the seed of the random draws.

    Raises:
        ConfigError: ill-formed settings, or a loss that is not finite at the start.
    """
    steps, _ = _checked(steps, l1)
    free, n = space.free, int(space.free.sum())
    rng = np.random.default_rng(seed)
    size = 4 + int(3 * np.log(n))
    best = _Best(loss, space, l1)
    mean, sigma, spread = space.start[free].copy(), 0.3, np.ones(n)
    share = np.log(size / 2 + 0.5) - np.log(np.arange(1, size // 2 + 1))
    share /= share.sum()
    mass = 1 / (share**2).sum()
    rate_sigma = (mass + 2) / (n + mass + 5)
    damping = 1 + rate_sigma + 2 * max(0.0, np.sqrt((mass - 1) / (n + 1)) - 1)
    rate_path = (4 + mass / n) / (n + 4 + 2 * mass / n)
    one = 2 / ((n + 1.3) ** 2 + mass)
    some = min(1 - one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
    one, some = one * (n + 2) / 3, min(some * (n + 2) / 3, 1 - one * (n + 2) / 3)
    expected = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
    path, path_sigma = np.zeros(n), np.zeros(n)
    for step in range(steps):
        drawn = rng.normal(size=(size, n))
        tried = np.clip(mean + sigma * np.sqrt(spread) * drawn, -LARGEST, LARGEST)
        order = np.argsort([best.ask(candidate) for candidate in tried], kind="stable")[
            : len(share)
        ]
        before, mean = mean, share @ tried[order]
        moved = (mean - before) / sigma
        path_sigma = (1 - rate_sigma) * path_sigma
        path_sigma += np.sqrt(rate_sigma * (2 - rate_sigma) * mass) * moved / np.sqrt(spread)
        length = np.linalg.norm(path_sigma) / np.sqrt(1 - (1 - rate_sigma) ** (2 * step + 2))
        steady = length < (1.4 + 2 / (n + 1)) * expected
        path = (1 - rate_path) * path + steady * np.sqrt(rate_path * (2 - rate_path) * mass) * moved
        each = ((tried[order] - before) / sigma) ** 2
        spread = (1 - one - some) * spread + one * path**2 + some * (share @ each)
        spread = np.maximum(spread, 1e-8)
        sigma *= float(np.exp((rate_sigma / damping) * (np.linalg.norm(path_sigma) / expected - 1)))
        best.end_step()
    return best.found()


def descended(
    gradient: Gradient,
    space: SearchSpace,
    *,
    steps: int = 40,
    learning_rate: float = 0.1,
    l1: float = 0.05,
) -> SearchedWeights:
    """Search by the gradient of the weights: Adam, with a rate that falls to zero as a cosine.

    Args:
        gradient: the mean loss of the examples under weights of the space's features, and its gradient.
        space: what is searched.
        steps: of Adam; each asks once.
        learning_rate: the first step's.
        l1: the price of the mean absolute weight.

    Raises:
        ConfigError: ill-formed settings, or a loss that is not finite at the start.
    """
    steps, learning_rate = _checked(steps, l1, learning_rate)
    free, last = space.free, np.zeros(len(space.start))

    def loss(weights: Weights) -> float:
        value, slope = gradient(weights)
        last[:] = slope
        return value

    best = _Best(loss, space, l1)
    weights = space.start[free].copy()
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(steps):
        slope = last[free] + l1 * np.sign(weights) / len(weights)
        first = 0.9 * first + 0.1 * slope
        second = 0.99 * second + 0.01 * slope**2
        rate = learning_rate * 0.5 * (1 + np.cos(np.pi * step / steps))
        change = (
            first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.99 ** (step + 1))) + 1e-12)
        )
        weights = np.clip(weights - rate * change, -LARGEST, LARGEST)
        best.ask(weights)
        best.end_step()
    return best.found()


class _Best:
    """The best weights so far, by loss and penalty."""

    def __init__(self, loss: Loss, space: SearchSpace, l1: float) -> None:
        self.loss, self.space, self.l1 = loss, space, l1
        self.history: list[float] = []
        self.value, self.least = np.inf, np.inf
        self.weights = space.start
        self.ask(space.start[space.free])
        self.before = self.least
        if not np.isfinite(self.before):
            raise ConfigError(
                f"the loss of the row that the search starts from is {self.before}; it must be finite"
            )

    def ask(self, free: Weights) -> float:
        """What some weights cost; what is not finite costs more than all that is."""
        weights = self.space.start.copy()
        weights[self.space.free] = free
        found = float(self.loss(weights))
        cost = found + self.l1 * float(np.abs(free).mean())
        if cost < self.value:
            self.value, self.least, self.weights = cost, found, weights
        return cost if np.isfinite(cost) else np.inf

    def end_step(self) -> None:
        self.history.append(self.least)

    def found(self) -> SearchedWeights:
        return SearchedWeights(
            self.space.row(self.weights), self.least, self.before, tuple(self.history)
        )


def search_weights(
    loss: Callable[[Mapping[str, Any]], float],
    registry: FeatureRegistry,
    row: Row,
    *,
    groups: Collection[str] | None = None,
    unknown: Unknown = "error",
    steps: int = 40,
    l1: float = 0.05,
    seed: int = 0,
) -> SearchedWeights:
    """Find the weights of known features that are best for a new combination, in any framework and without gradients.

    Each backend's ``search_weights`` does this for a model and its examples.

    Args:
        loss: a function of a row: the mean loss of a few dozen examples under this row.
        registry: the features.
        row: what is known about the combination, for example ``{"task": "ner"}``; the search starts there.
        groups: the groups whose features are all tried, for example ``["language"]``; default: all groups.
        unknown: as for ``encode``: ``"skip"`` for a row that names a language without a feature.
        steps: the number of generations, each with 4 + 3 ln(n) losses.
        l1: the price of the mean absolute weight.
        seed: the seed of the random draws.

    Raises:
        ConfigError, FeatureError, RoutingError: ill-formed settings, groups or row; a loss that is not finite.
    """
    space = SearchSpace(registry, row, groups, unknown)
    return evolved(lambda w: loss(space.row(w)), space, steps=steps, l1=l1, seed=seed)


def _checked(steps: int, l1: float, learning_rate: float = 1.0) -> tuple[int, float]:
    steps = whole(steps, "steps", 1)
    for name, value in (("l1", l1), ("learning_rate", learning_rate)):
        if finite(value, name, ConfigError) < 0:
            raise ConfigError(f"{name} must not be negative, got {value}")
    return steps, learning_rate
