"""A mixture of experts by the formula, made of the oracle's single layers (docs/specification.md §1.4)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flix_conformance import oracle
from flix_conformance.harness import AdamW, Array, Batch, Case, Experts, Pairs


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of experts with the features' pairs in its two kernels, and the batch that it gets.

    Attributes:
        experts: the plain one.
        up, down: its kernels as cases, ``[E, d_in, d_out]``, with pairs ``[E, r, d_in]`` and ``[E, d_out, r]``; both
            have the batch's ids and weights, and up its x.
    """

    experts: Experts
    up: Case
    down: Case

    def routed(self, batch: Batch) -> Mixture:
        """The same mixture with another batch."""
        given = {"ids": batch.ids, "weights": batch.weights}
        return replace(self, up=self.up.but(x=batch.x, **given), down=self.down.but(**given))

    def holding(self, up: Pairs, down: Pairs) -> Mixture:
        """The same mixture with other values."""
        return replace(self, up=self.up.but(pairs=up), down=self.down.but(pairs=down))


@dataclass(frozen=True)
class Gradients:
    """Gradients of Σ y · dy: of x, of the routing's weights, and of the pairs in either kernel."""

    x: Array
    weights: Array
    up: Pairs
    down: Pairs


def expert(case: Case, number: int) -> Case:
    """One expert's kernel as a layer by itself."""
    pairs = {f: (a[number], b[number]) for f, (a, b) in case.pairs.items()}
    return case.but(path=f"{case.path}.{number}", kernel=case.kernel[number], pairs=pairs)


def _shares(mixture: Mixture, number: int) -> Array:
    """What an expert's output counts at each position, ``[B, ..., 1]``; 0 where nothing is sent to it."""
    lead, experts = mixture.up.x.shape[:-1], mixture.experts
    place = np.arange(int(np.prod(lead))) % len(experts.sent)
    counted = np.where(experts.sent == number, experts.share.astype(np.float64), 0.0).sum(1)
    return counted[place].reshape(*lead, 1)  # type: ignore[no-any-return]


def _silu(x: Array) -> tuple[Array, Array]:
    """silu and its derivative."""
    gate = 1.0 / (1.0 + np.exp(-x))
    return x * gate, gate * (1.0 + x * (1.0 - gate))


def forward(mixture: Mixture) -> tuple[Array, Array]:
    """The output, and the size of what was summed: rounding before a gate comes out of it again."""
    y = size = np.zeros(())
    for number in range(len(mixture.up.kernel)):
        up, down = expert(mixture.up, number), expert(mixture.down, number)
        share = _shares(mixture, number)
        g, u = np.split(oracle.forward(up), 2, -1)
        y = y + share * oracle.forward(down.but(x=_silu(g)[0] * u))
        g, u = np.split(oracle.forward(oracle.magnitude(up)), 2, -1)
        size = size + np.abs(share) * oracle.forward(oracle.magnitude(down).but(x=g * u))
    return y, size


def gradients(mixture: Mixture, dy: Array) -> tuple[Gradients, Gradients]:
    """Gradients of Σ y · dy by the chain rule, and the sizes of the sums that they are."""
    found: list[list[oracle.Gradients]] = []
    for number in range(len(mixture.up.kernel)):
        up, down = expert(mixture.up, number), expert(mixture.down, number)
        d = _shares(mixture, number) * dy
        sizes = np.split(oracle.forward(oracle.magnitude(up)), 2, -1)
        g, u = np.split(oracle.forward(up), 2, -1)
        value, slope = _silu(g)
        after = oracle.gradients(down.but(x=value * u), d)
        before = oracle.gradients(up, np.concatenate([after.x * u * slope, after.x * value], -1))
        large = oracle.gradients(oracle.magnitude(down).but(x=sizes[0] * sizes[1]), np.abs(d))
        # The slope is at most 1.1.
        d = 1.1 * np.concatenate([large.x * sizes[1], large.x * sizes[0]], -1)
        found.append([before, after, oracle.gradients(oracle.magnitude(up), d), large])
    ups, downs, large_ups, large_downs = zip(*found, strict=True)
    return _joined(ups, downs), _joined(large_ups, large_downs)


def _joined(ups: Sequence[oracle.Gradients], downs: Sequence[oracle.Gradients]) -> Gradients:
    def pairs(parts: Sequence[oracle.Gradients]) -> Pairs:
        return {
            feature: (
                np.stack([part.pairs[feature][0] for part in parts]),
                np.stack([part.pairs[feature][1] for part in parts]),
            )
            for feature in parts[0].pairs
        }

    weights = sum((p.weights for p in (*ups, *downs)), np.zeros(()))
    return Gradients(sum((p.x for p in ups), np.zeros(())), weights, pairs(ups), pairs(downs))


def merged(case: Case, active: dict[tuple[str, str], float]) -> tuple[Array, Array]:
    """A kernel ``[E, d_in, d_out]`` with one composition folded in, and its size."""
    each = [expert(case, number) for number in range(len(case.kernel))]
    large = {feature: abs(weight) for feature, weight in active.items()}
    return (
        np.stack([oracle.merged(one, active) for one in each]),
        np.stack([oracle.merged(oracle.magnitude(one), large) for one in each]),
    )


class Run(oracle.Run):
    """A training run of a mixture; a feature that some row lists moves in every expert."""

    def __init__(self, mixture: Mixture, settings: AdamW) -> None:
        super().__init__([mixture.up, mixture.down], settings)
        self.mixture = mixture

    def step(self, batch: Batch, frozen: Collection[tuple[str, str]] = ()) -> list[Pairs]:
        """One step, and both kernels' pairs after it."""
        now = self.mixture.holding(*(case.pairs for case in self.layers)).routed(batch)
        y, _ = forward(now)
        found, _ = gradients(now, (y - batch.target) / len(batch.x))
        for place, own in enumerate((found.up, found.down)):
            case = self.layers[place]
            pairs = dict(case.pairs)
            for feature in set(oracle.listed(case, batch.ids)) - set(frozen):
                pairs[feature] = self._moved(place, feature, pairs[feature], own[feature])
            self.layers[place] = case.but(pairs=pairs)
        return [case.pairs for case in self.layers]
