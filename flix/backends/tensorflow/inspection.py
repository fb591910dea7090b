"""What an adapted model has: its trainable variables, and a summary in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from flix.backends.tensorflow._base import flix_layers
from flix.backends.tensorflow._layer import is_table
from flix.backends.tensorflow.model import FlixModel, require_adapted
from flix.core.adapter import tensor_name
from flix.core.registry import Feature


def trainable_parameters(model: FlixModel) -> list[Any]:
    """The variables that an optimizer should get: the layers' tables, and what was unfrozen by hand.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "trainable_parameters")
    return list(model.trainable_variables)


def named_pairs(model: FlixModel) -> dict[str, NDArray[Any]]:
    """The features' values under the names that adapter files use: ``<path>.A.<group>.<feature>``; copies.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "named_pairs")
    return {
        tensor_name(path, part, feature): value
        for path, layer in flix_layers(model.base)
        for feature, a, b in layer.pairs()
        for part, value in (("A", a), ("B", b))
    }


@dataclass(frozen=True)
class Summary:
    """An adapted model in numbers; its text is a table.

    Attributes:
        layers: the adapted layers.
        total: parameters in all.
        trainable: parameters that are trained.
        features: parameters of each feature over all layers.
        ranks: the configuration's rank of each feature.
    """

    layers: tuple[str, ...]
    total: int
    trainable: int
    features: dict[Feature, int]
    ranks: dict[Feature, int]

    def __str__(self) -> str:
        share = 100.0 * self.trainable / max(self.total, 1)
        lines = [
            f"{len(self.layers)} adapted layers; {self.trainable:,} trainable of {self.total:,} "
            f"parameters ({share:.2f}%)",
            f"{'feature':<32}{'rank':>6}{'parameters':>14}",
        ]
        lines += [
            f"{':'.join(feature):<32}{self.ranks[feature]:>6}{count:>14,}"
            for feature, count in self.features.items()
        ]
        return "\n".join(lines)


def summary(model: FlixModel) -> Summary:
    """Layers, ranks and parameter counts of an adapted model; ``print(summary(model))``.

    Raises:
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "summary")
    counts = dict.fromkeys(config.registry.features, 0)
    layers, frozen = [], 0
    for path, layer in flix_layers(model.base):
        layers.append(path)
        for i, feature in enumerate(config.registry.features):
            size = layer.flix_layout.ranks[i] * (layer.d_in + layer.d_out)
            counts[feature] += size
            frozen += size if i in layer.flix_frozen else 0
    others = [v for v in model.variables if not is_table(v)]
    features = sum(counts.values())
    unfrozen = [v for v in model.trainable_variables if not is_table(v)]
    return Summary(
        layers=tuple(layers),
        total=features + sum(math.prod(v.shape) for v in others),
        trainable=features - frozen + sum(math.prod(v.shape) for v in unfrozen),
        features=counts,
        ranks=dict(config.ranks),  # type: ignore[arg-type]
    )
