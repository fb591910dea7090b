"""What an adapted model has: its trainable parameters, and a summary in numbers."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from flix.backends.jax.files import Source, config_and_bank
from flix.backends.jax.layers import FlixParam
from flix.backends.jax.model import require_adapted
from flix.core.adapter.adapter import tensor_name
from flix.core.adapter.summary import Summary


def trainable_parameters(model: nnx.Module) -> Any:
    """The state that an optimizer should get: an ``nnx.State`` of the :class:`FlixParam` tables.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "trainable_parameters")
    return nnx.state(model, FlixParam)


def named_pairs(source: Source) -> dict[str, jax.Array]:
    """The features' values under the names that adapter files use: ``<path>.A.<group>.<feature>``.

    Args:
        source: an adapted model, or ``(config, bank)``.

    Raises:
        TargetError: the model is not adapted.
    """
    _, bank = config_and_bank(source, "named_pairs")
    return {
        tensor_name(path, part, feature): value
        for path, layer in bank.items()
        for feature, a, b in layer.pairs()
        for part, value in (("A", a), ("B", b))
    }


def summary(source: Source) -> Summary:
    """Layers, ranks and parameter counts of an adapted model, or of ``(config, bank)``; ``print(summary(model))``.

    Raises:
        TargetError: the model is not adapted.
    """
    config, bank = config_and_bank(source, "summary")
    counts = dict.fromkeys(config.registry.live, 0)
    trainable = total = 0
    for layer in bank.values():
        size = layer.spec.shape.d_in + layer.spec.shape.d_out
        total += layer.spec.rows * size
        for feature in config.registry.live:
            i = config.registry.id(*feature)
            own = int(layer.spec.ranks[i]) * size
            counts[feature] += own
            trainable += 0 if i in layer.spec.frozen else own
    if isinstance(source, nnx.Module):
        total = sum(int(leaf.size) for leaf in jax.tree.leaves(nnx.state(source, nnx.Param)))
    return Summary(
        layers=tuple(bank),
        total=total,
        trainable=trainable,
        features=counts,
        ranks={f: int(config.ranks[f]) for f in config.registry.live},  # type: ignore[index]
    )
