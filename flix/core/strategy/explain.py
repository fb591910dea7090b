"""Which strategy each layer of a model would run on a batch of some size, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flix.core.adapter.adapter import LayerShape
from flix.core.config.config import FlixConfig
from flix.core.costs import Layers, active_sets, every_combination
from flix.core.features.encoding import Row
from flix.core.strategy.decide import Decision, Facts, decide


@dataclass(frozen=True)
class Batch:
    """A batch: rows of the routing, positions that share one, and the class of devices."""

    examples: int
    positions: int
    device: str


@dataclass(frozen=True)
class Choice:
    """Layers that are alike, and what they would run.

    Attributes:
        layers: their paths.
        shape: of each of them.
        decision: the strategy and why.
    """

    layers: tuple[str, ...]
    shape: LayerShape
    decision: Decision

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        facts = self.decision.facts
        return {
            "layers": list(self.layers),
            "d_in": self.shape.d_in,
            "d_out": self.shape.d_out,
            "rows": facts.rows,
            "union": facts.union,
            "strategy": self.decision.strategy,
            "reason": self.decision.reason,
        }


def explain(
    config: FlixConfig, layers: Layers, datasets: Sequence[Row] | None, batch: Batch
) -> list[Choice]:
    """The strategy of each linear layer of a model under ``"auto"``, for the fullest batch of its datasets.

    Args:
        config: the configuration.
        layers: the adapted layers.
        datasets: the features of each dataset; default: one feature of every group, in all combinations.
        batch: the batch.

    Raises:
        ConfigError: a framework that nobody measured.
        FeatureError, RoutingError: a dataset that cannot be encoded.
    """
    rows = every_combination(config.registry) if datasets is None else list(datasets)
    sets = active_sets(config.registry, rows)
    found: dict[tuple[LayerShape, Facts], list[str]] = {}
    for path, shape in layers.items():
        if shape.kind != "linear" or shape.experts:  # those have one way alone
            continue
        ranks = config.layout(path).ranks
        used = sorted((sum(ranks[i] for i in ids) for ids in sets), reverse=True)
        everything = sum(ranks[i] for i in frozenset().union(*sets))
        facts = Facts(
            examples=batch.examples,
            positions=batch.positions,
            rows=used[0] if used else 0,
            union=min(everything, sum(used[: batch.examples])),
            device=batch.device,
        )
        found.setdefault((shape, facts), []).append(path)
    return [
        Choice(tuple(paths), shape, decide("auto", facts))
        for (shape, facts), paths in found.items()
    ]
