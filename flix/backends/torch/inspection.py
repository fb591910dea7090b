"""What an adapted model has: its trainable parameters, and a summary in numbers."""

from __future__ import annotations

from torch import nn

from flix.backends.torch.model import flix_layers, require_adapted
from flix.core.adapter.adapter import tensor_name
from flix.core.adapter.summary import Summary


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer should get: all that require gradients.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "trainable_parameters")
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def named_pairs(model: nn.Module) -> dict[str, nn.Parameter]:
    """The features' parameters under the names that adapter files use: ``<path>.A.<group>.<feature>``.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "named_pairs")
    return {
        tensor_name(path, part, feature): parameter
        for path, layer in flix_layers(model)
        for feature, a, b in layer.pairs()
        for part, parameter in (("A", a), ("B", b))
    }


def summary(model: nn.Module) -> Summary:
    """Layers, ranks and parameter counts of an adapted model; ``print(summary(model))``.

    Raises:
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "summary")
    counts = dict.fromkeys(config.registry.live, 0)
    layers = []
    for path, layer in flix_layers(model):
        layers.append(path)
        for feature, a, b in layer.pairs():
            counts[feature] += a.numel() + b.numel()
    return Summary(
        layers=tuple(layers),
        total=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        features=counts,
        ranks=dict(config.ranks),  # type: ignore[arg-type]
    )
