"""Ranks and scales of all features in one layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerLayout:
    """Ranks and scales of all features in one layer, by id. Hashable: equal layers share what is made for it.

    Attributes:
        ranks: r_f of each feature; 0 where the feature has no update.
        scales: s_f of each feature.
    """

    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        # Looked up once a layer and a forward; with thousands of features, making them afresh would show.
        object.__setattr__(self, "_hash", hash((self.ranks, self.scales)))
        arrays = (
            np.asarray((*self.ranks, 0), dtype=np.int64),
            np.asarray((*self.scales, 0.0), dtype=np.float64),
        )
        object.__setattr__(self, "_arrays", arrays)

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined,no-any-return]

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ranks and scales, each with a 0 at the end, which an id of -1 finds; not to be written to."""
        return self._arrays  # type: ignore[attr-defined,no-any-return]
