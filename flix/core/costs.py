"""What a mixture costs, beside the LoRAs it is compared with: parameters and arithmetic, in closed form.

A low-rank pair of rank r on a linear map ``d_in -> d_out`` has r (d_in + d_out) parameters and takes
2 r (d_in + d_out) floating-point operations a token in the forward (a multiplication and an addition each). On an
embedding the lookup in A is free: 2 r d_out. A layer of E experts has E pairs, of which a token passes through those
of the experts that it is sent to. A mixture's cost is that of the features active in a row, whatever
else is registered.

Two LoRAs are worth comparing with: the *compute-matched* one, whose rank is the largest sum of active ranks of a
dataset, and the *parameter-matched* one, whose rank is the sum of all ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flix.core.adapter.adapter import LayerShape
from flix.core.config.config import FlixConfig
from flix.core.errors import ConfigError
from flix.core.features.encoding import Row
from flix.core.features.names import Feature
from flix.core.features.registry import FeatureRegistry

Layers = Mapping[str, LayerShape]

_MOST_COMBINATIONS = 200_000


@dataclass(frozen=True)
class Cost:
    """What one form of adaptation costs.

    Attributes:
        rank: the rank that is active in a row.
        parameters: trainable parameters.
        flops: forward operations a token that the update adds, over all adapted layers.
    """

    rank: int
    parameters: int
    flops: int

    def to_dict(self) -> dict[str, int]:
        """A JSON-able form."""
        return {"rank": self.rank, "parameters": self.parameters, "flops_per_token": self.flops}


@dataclass(frozen=True)
class FeatureCost:
    """One feature's share.

    Attributes:
        feature: (group, name).
        rank: the configuration's rank, before ``rank_pattern``.
        parameters: over all layers.
        flops: a token, where it is active.
    """

    feature: Feature
    rank: int
    parameters: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """A mixture beside its two matched LoRAs.

    Attributes:
        features: the cost of each feature, in the order of ids.
        mixture: all parameters, and rank and operations of the dataset that takes most.
        compute_matched: the LoRA with the same arithmetic as that dataset.
        parameter_matched: the LoRA with the same number of parameters.
        base_flops: forward operations a token of the frozen adapted layers.
        layers: the number of adapted layers.
        datasets: the number of combinations of features that were looked at.
    """

    features: tuple[FeatureCost, ...]
    mixture: Cost
    compute_matched: Cost
    parameter_matched: Cost
    base_flops: int
    layers: int
    datasets: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "layers": self.layers,
            "datasets": self.datasets,
            "base_flops_per_token": self.base_flops,
            "features": [
                {
                    "group": item.feature[0],
                    "feature": item.feature[1],
                    "rank": item.rank,
                    "parameters": item.parameters,
                    "flops_per_token": item.flops,
                }
                for item in self.features
            ],
            "mixture": self.mixture.to_dict(),
            "compute_matched_lora": self.compute_matched.to_dict(),
            "parameter_matched_lora": self.parameter_matched.to_dict(),
        }


def pair_parameters(shape: LayerShape, rank: int) -> int:
    """Parameters of a pair of this rank on a layer: r (d_in + d_out), for each expert if it has some."""
    return shape.parameters(rank)


def pair_flops(shape: LayerShape, rank: int) -> int:
    """Forward operations a token of a pair of this rank on a layer."""
    if shape.kind == "embedding":
        return 2 * rank * shape.d_out
    return 2 * shape.active * rank * (shape.d_in + shape.d_out)


def layer_flops(shape: LayerShape) -> int:
    """Forward operations a token of the frozen layer itself; a lookup takes none."""
    return 0 if shape.kind == "embedding" else 2 * shape.active * shape.d_in * shape.d_out


def lora_cost(layers: Layers, rank: int) -> Cost:
    """The cost of one LoRA of this rank on every layer."""
    return Cost(
        rank=rank,
        parameters=sum(pair_parameters(shape, rank) for shape in layers.values()),
        flops=sum(pair_flops(shape, rank) for shape in layers.values()),
    )


def feature_cost(config: FlixConfig, layers: Layers, feature: Feature) -> FeatureCost:
    """The cost of one feature; ``rank_pattern`` is taken into account.

    Raises:
        FeatureError: no such feature.
    """
    config.registry.id(*feature)
    ranks = {path: config.rank(path, feature) for path in layers}
    return FeatureCost(
        feature=feature,
        rank=int(config.ranks[feature]),  # type: ignore[index]
        parameters=sum(pair_parameters(layers[path], rank) for path, rank in ranks.items()),
        flops=sum(pair_flops(layers[path], rank) for path, rank in ranks.items()),
    )


def active_sets(registry: FeatureRegistry, rows: Sequence[Row]) -> list[frozenset[int]]:
    """The distinct sets of features that rows activate, what they imply included.

    Raises:
        FeatureError, RoutingError: as for encoding.
    """
    routing = registry.encode(rows)
    return list(dict.fromkeys(frozenset(i for i in ids if i >= 0) for ids in routing.ids.tolist()))


def every_combination(registry: FeatureRegistry) -> list[Row]:
    """One feature of every group that no other feature implies, in all combinations.

    This stands in for the datasets where they are not known. Groups too rich for that are walked through side by
    side instead, so that every feature occurs.
    """
    implied = registry.implied_ids
    free = [g for g in registry.groups if not all(i in implied for i in registry.ids_of(g))]
    names = [registry.names(group) for group in free]
    count = math.prod(len(choices) for choices in names)
    if count <= _MOST_COMBINATIONS:
        return [dict(zip(free, choice, strict=True)) for choice in itertools.product(*names)]
    longest = max(len(choices) for choices in names)
    return [
        {g: choices[n % len(choices)] for g, choices in zip(free, names, strict=True)}
        for n in range(longest)
    ]


def plan(config: FlixConfig, layers: Layers, datasets: Sequence[Row] | None = None) -> Plan:
    """The cost of a mixture, beside its two matched LoRAs.

    With one rank a feature in all layers, the compute-matched rank is the largest sum of active ranks of a dataset
    and the parameter-matched rank the sum of all ranks. Under ``rank_pattern`` they are the smallest rank that
    takes no less arithmetic, and the rank nearest in parameters.

    Args:
        config: the mixture.
        layers: the adapted layers.
        datasets: the features of each dataset; default: :func:`every_combination`.

    Raises:
        ConfigError: no layers, or an empty list of datasets.
        FeatureError, RoutingError: a dataset that cannot be encoded.
    """
    if not layers:
        raise ConfigError("a plan needs at least one adapted layer, got none")
    rows = every_combination(config.registry) if datasets is None else list(datasets)
    if not rows:
        raise ConfigError("a plan needs at least one dataset, got none")
    registry = config.registry
    features = {registry.id(*f): feature_cost(config, layers, f) for f in registry.live}
    sets = active_sets(config.registry, rows)
    fullest = max(
        sets,
        key=lambda ids: (sum(features[i].flops for i in ids), sum(features[i].rank for i in ids)),
    )
    most = sum(features[i].flops for i in fullest)
    parameters = sum(item.parameters for item in features.values())
    unit = lora_cost(layers, 1)
    plain = not config.rank_pattern
    rank = max(sum(features[i].rank for i in ids) for ids in sets)
    total = sum(item.rank for item in features.values())
    if not plain:
        rank = math.ceil(most / unit.flops) if unit.flops else rank
        total = round(parameters / unit.parameters)
    return Plan(
        features=tuple(features.values()),
        mixture=Cost(rank=rank, parameters=parameters, flops=most),
        compute_matched=lora_cost(layers, rank),
        parameter_matched=lora_cost(layers, max(total, 1) if parameters else 0),
        base_flops=sum(layer_flops(shape) for shape in layers.values()),
        layers=len(layers),
        datasets=len(sets),
    )
