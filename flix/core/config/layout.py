"""Ranks and scales of all features in one layer, and where they stand in tables of all features' pairs.

Backends that keep a layer's features in one packed pair of tables stack the ranks of all, in the order of the features'
ids: A ``[P, d_in]`` and B, transposed, ``[P, d_out]``. Gathering a batch's rows then costs what the batch uses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """The ranks as int32 ``[F + 1]``, the last for padding: 0."""
        return self.arrays()[0].astype(np.int32)

    @cached_property
    def starts(self) -> NDArray[np.int32]:
        """The first row of each feature in the tables: int32 ``[F + 1]``, the last for padding."""
        return (np.cumsum(self.lengths) - self.lengths).astype(np.int32)

    @property
    def rows(self) -> int:
        """P, the rows of the tables: the sum of the ranks."""
        return int(self.starts[-1])

    @cached_property
    def widest(self) -> int:
        """The largest rank."""
        return max(self.ranks, default=0)

    @cached_property
    def _most(self) -> NDArray[np.int64]:
        return np.append(0, np.cumsum(sorted(self.ranks, reverse=True), dtype=np.int64))

    def most(self, features: int | None) -> int:
        """The most rows that so many features can have; None is any number."""
        count = len(self.ranks)
        return int(self._most[count if features is None else min(features, count)])

    def span(self, feature: int) -> slice:
        """The rows of the tables that are a feature's, by id."""
        start = int(self.starts[feature])
        return slice(start, start + self.ranks[feature])

    def put(self, a: Any, b: Any, pairs: Mapping[int, tuple[Any, Any]]) -> None:
        """Write pairs, A ``[r, d_in]`` and B ``[d_out, r]`` by id, into tables."""
        for i, (own_a, own_b) in pairs.items():
            if self.ranks[i]:
                a[self.span(i)], b[self.span(i)] = own_a, np.transpose(own_b)

    def pairs(
        self, a: Any, b: Any, ids: Collection[int] | None = None
    ) -> dict[int, tuple[Any, Any]]:
        """The pairs of some features, by default of all, as slices of tables, by id; without those of rank 0."""
        chosen = range(len(self.ranks)) if ids is None else ids
        return {i: (a[self.span(i)], b[self.span(i)].T) for i in chosen if self.ranks[i]}
