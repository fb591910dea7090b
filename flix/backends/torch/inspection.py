"""What an adapted model has: its trainable parameters, and a summary in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from flix.backends.torch.model import flix_layers, require_adapted
from flix.core.adapter import tensor_name
from flix.core.registry import Feature


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


@dataclass(frozen=True)
class Summary:
    """An adapted model in numbers; its text is a table.

    Attributes:
        layers: the adapted layers.
        total: parameters in all.
        trainable: parameters that require gradients.
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


def summary(model: nn.Module) -> Summary:
    """Layers, ranks and parameter counts of an adapted model; ``print(summary(model))``.

    Raises:
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "summary")
    counts = dict.fromkeys(config.registry.features, 0)
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
