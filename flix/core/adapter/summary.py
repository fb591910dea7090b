"""An adapted model in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from flix.core.features.names import Feature, written
from flix.core.tables import text_table


@dataclass(frozen=True)
class Counts:
    """Numbers of values beside the features' pairs.

    Attributes:
        total: in all.
        trainable: those that train: heads that were unfrozen.
    """

    total: int = 0
    trainable: int = 0


@dataclass(frozen=True)
class Summary:
    """An adapted model in numbers; ``str()`` gives a table.

    Attributes:
        layers: the adapted layers.
        total: all parameters (for a bank without a model, those of the pairs).
        trainable: parameters that are trained.
        features: parameters of each feature over all layers.
        ranks: the configuration's rank of each feature.
    """

    layers: tuple[str, ...]
    total: int
    trainable: int
    features: dict[Feature, int]
    ranks: dict[Feature, int]

    @property
    def line(self) -> str:
        """Layers and counts in one line."""
        share = 100.0 * self.trainable / max(self.total, 1)
        return (
            f"{len(self.layers)} adapted layers; {self.trainable:,} trainable of {self.total:,} "
            f"parameters ({share:.2f}%)"
        )

    def __str__(self) -> str:
        rows = [(written(f), self.ranks[f], count) for f, count in self.features.items()]
        return self.line + "\n" + text_table(["feature", "rank", "parameters"], rows)
