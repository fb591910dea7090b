"""Routing: which features act in each row of a batch, and how strongly (docs/specification.md §2.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import RoutingError
from flix.core.features.table import FeatureTable


@dataclass(frozen=True, eq=False)
class Routing:
    """The active features of each row.

    Attributes:
        ids: int32 ``[batch, width]`` (or ``[batch, length, width]`` for per-token routing); -1 pads.
        weights: float32 in the shape of ``ids``; 0 where ids is -1.
        registry: the registry that the ids belong to.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    registry: FeatureTable

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def width(self) -> int:
        """The number of entries in a row."""
        return int(self.ids.shape[-1])

    def __getitem__(self, rows: Any) -> Routing:
        """The routing of some rows (a slice, or an array of row numbers)."""
        if isinstance(rows, int | np.integer):
            rows = [rows]
        return Routing(self.ids[rows], self.weights[rows], self.registry)

    def names(self, row: int) -> dict[tuple[str, str], float]:
        """The features of a row with their weights; for messages and inspection."""
        ids, weights = self.ids[row].ravel(), self.weights[row].ravel()
        return {
            self.registry.features[i]: float(w)
            for i, w in zip(ids.tolist(), weights.tolist(), strict=True)
            if i >= 0
        }


def check_routing(
    ids: NDArray[Any],
    weights: NDArray[Any] | None,
    registry: FeatureTable,
    *,
    batch: int | None = None,
) -> None:
    """Refuse routing arrays that break the rules; backends call this on the host before they execute.

    Args:
        ids: integer ``[batch, width]`` or ``[batch, length, width]``, each -1 (padding) or a feature's id.
        weights: None, or finite floats in the shape of ``ids``.
        registry: the registry that the ids belong to.
        batch: the number of rows expected, if known.

    Raises:
        RoutingError: wrong dtype, rank, shape, range or batch size; the first bad row is named.
    """
    if ids.dtype.kind not in "iu":
        raise RoutingError(
            f"flix_features must hold integer ids, got dtype {ids.dtype}; make them with "
            "registry.encode(rows)"
        )
    if ids.ndim not in (2, 3):
        raise RoutingError(
            "flix_features must have the shape [batch, width] or [batch, length, width], "
            f"got {list(ids.shape)}"
        )
    if batch is not None and ids.shape[0] != batch:
        raise RoutingError(
            f"flix_features routes {ids.shape[0]} rows, but the batch has {batch} rows; "
            "one row of ids is needed for each row of the batch"
        )
    bad = (ids < -1) | (ids >= len(registry))
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise RoutingError(
            f"flix_features has the id {int(ids[place])} in row {place[0]} (position {list(place)}); "
            f"valid ids are 0 to {len(registry) - 1}, and -1 for padding"
        )
    if registry.removed:
        _check_removed(ids, registry)
    if weights is None:
        return
    if weights.dtype.kind not in "fV":  # V: bfloat16 seen from numpy
        raise RoutingError(f"flix_weights must be floating point, got dtype {weights.dtype}")
    if weights.shape != ids.shape:
        raise RoutingError(
            f"flix_weights must have the shape of flix_features, {list(ids.shape)}, "
            f"got {list(weights.shape)}"
        )
    odd = ~np.isfinite(weights)
    if odd.any():
        place = tuple(int(i) for i in np.argwhere(odd)[0])
        feature = int(ids[place])
        name = ":".join(registry.features[feature]) if feature >= 0 else "padding"
        raise RoutingError(
            f"flix_weights must be finite, got {weights[place]} in row {place[0]} for {name}"
        )


def _check_removed(ids: NDArray[Any], registry: FeatureTable) -> None:
    found = np.isin(ids, registry.removed_ids)
    if found.any():
        place = tuple(int(i) for i in np.argwhere(found)[0])
        name = ":".join(registry.features[int(ids[place])])
        raise RoutingError(
            f"flix_features has the id {int(ids[place])} in row {place[0]}: {name}, which was removed; "
            "make ids with registry.encode(rows)"
        )
