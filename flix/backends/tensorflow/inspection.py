"""What an adapted model has: its trainable variables, and a summary in numbers."""

from __future__ import annotations

import math
from typing import Any

from numpy.typing import NDArray

from flix.backends.tensorflow._base import flix_layers
from flix.backends.tensorflow._layer import is_table
from flix.backends.tensorflow.model import FlixModel, require_adapted
from flix.core.adapter.adapter import tensor_name
from flix.core.adapter.summary import Summary


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


def summary(model: FlixModel) -> Summary:
    """Layers, ranks and parameter counts of an adapted model; ``print(summary(model))``.

    Raises:
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "summary")
    counts = dict.fromkeys(config.registry.live, 0)
    layers, frozen = [], 0
    for path, layer in flix_layers(model.base):
        layers.append(path)
        for feature in config.registry.live:
            i = config.registry.id(*feature)
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
        ranks={f: int(config.ranks[f]) for f in config.registry.live},  # type: ignore[index]
    )
