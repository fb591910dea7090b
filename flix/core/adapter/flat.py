"""Where a feature's pairs lie when all of them are one vector (docs/specification.md §5.2): the arithmetic of it.

A feature's vector holds, for one layer after the other, its A ``[r, d_in]`` and then its B transposed, ``[r, d_out]``,
both row by row; where a layer has E experts, ``[E, r, d_in]`` and ``[E, r, d_out]``. A layer in which the feature has
rank 0 takes nothing. So a rank's row of A and its row of B are each contiguous, and layers that join later come after
the others: the vectors of features that have no rank in them stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.adapter import LayerShape, Pair
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.features.names import Feature


@dataclass(frozen=True, eq=False)
class FlatLayout:
    """The vectors of all features of some layers.

    Attributes:
        places: the layers' places, by path.
        shapes: their sizes, by place.
        layouts: their ranks and scales, by place; equal ones are one object.
    """

    places: Mapping[str, int]
    shapes: tuple[LayerShape, ...]
    layouts: tuple[LayerLayout, ...]

    @cached_property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """How each feature's vector is split, by id: the sizes of A and B of each layer in turn; 0 at rank 0."""
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        kinds = list(dict.fromkeys(self.layouts))
        which = [kinds.index(layout) for layout in self.layouts]
        found = []
        for ranks in zip(*(kind.ranks for kind in kinds), strict=True):
            if ranks not in known:
                times = [max(s.experts, 1) for s in self.shapes]
                sides = ((n * s.d_in, n * s.d_out) for n, s in zip(times, self.shapes, strict=True))
                known[ranks] = tuple(
                    ranks[kind] * d for kind, pair in zip(which, sides, strict=True) for d in pair
                )
            found.append(known[ranks])
        return tuple(found)

    @cached_property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """Where the parts of :attr:`sizes` begin, by id; the last entry is the vector's length."""
        known: dict[int, tuple[int, ...]] = {}
        for sizes in self.sizes:
            if id(sizes) not in known:
                known[id(sizes)] = tuple(accumulate(sizes, initial=0))
        return tuple(known[id(sizes)] for sizes in self.sizes)

    @cached_property
    def _begin(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """:attr:`starts` as an array ``[kinds, 2 layers + 1]`` of those that differ, and which each feature has."""
        kinds = {starts: kind for kind, starts in enumerate(dict.fromkeys(self.starts))}
        which = [kinds[starts] for starts in self.starts]
        return np.asarray(list(kinds), np.int64), np.asarray(which, np.int64)

    def addresses(
        self,
        places: Sequence[int],
        features: Sequence[int],
        at: Sequence[int],
        within: NDArray[np.int64],
        itemsize: int,
    ) -> NDArray[np.int64]:
        """Where each rank's row of A, and of B transposed, lies in memory: for kernels that read vectors as they are.

        Args:
            places: layers in which these features have the same ranks, all above 0, and which have no experts.
            features: ids.
            at: the address of each one's vector.
            within: ``[U]``, which rank of its feature each of them is (``strategy.union.bank_rows``).
            itemsize: bytes of a value.

        Returns:
            ``[layers, 2, U]``, of the U ranks of the features, one feature after the other.
        """
        ranks = [self.rank(feature, places[0]) for feature in features]
        begin, which = self._begin
        columns = 2 * np.asarray(places)[:, None] + [0, 1]
        parts = begin[which[list(features)]][:, columns]  # [features, layers, 2]
        sizes = np.asarray([(self.shapes[p].d_in, self.shapes[p].d_out) for p in places])
        first = np.repeat(np.asarray(at, np.int64)[:, None, None] + itemsize * parts, ranks, axis=0)
        found: NDArray[np.int64] = (first + itemsize * within[:, None, None] * sizes).transpose(
            1, 2, 0
        )
        return found

    def length(self, feature: int) -> int:
        """The length of a feature's vector; 0 where it has no update in any layer."""
        return self.starts[feature][-1]

    def rank(self, feature: int, place: int) -> int:
        """A feature's rank in a layer."""
        return self.layouts[place].ranks[feature]

    def put(self, vector: NDArray[np.generic], feature: int, path: str, pair: Pair) -> None:
        """Write a feature's pair of a layer into its vector."""
        a, b = self.views(vector, feature, self.places[path])
        a[...], b[...] = pair

    def packed(
        self,
        ids: Mapping[Feature, int],
        pairs: Iterable[tuple[str, Mapping[Feature, Pair]]],
        chosen: Iterable[Feature],
        dtype: type[np.floating[Any]],
    ) -> dict[int, NDArray[Any]]:
        """The vectors of some features, by id, of pairs by layer and feature; without those that have no update."""
        made = {
            i: np.empty(n, dtype) for i in map(ids.__getitem__, chosen) if (n := self.length(i))
        }
        for path, layer in pairs:
            for feature, pair in layer.items():
                if ids[feature] in made:
                    self.put(made[ids[feature]], ids[feature], path, pair)
        return made

    def views(self, vector: NDArray[np.generic], feature: int, place: int) -> Pair:
        """A ``[r, d_in]`` and B ``[d_out, r]`` of a layer, over its experts if it has some, as views of a vector."""
        rank, shape = self.rank(feature, place), self.shapes[place]
        start, middle, end = self.starts[feature][2 * place : 2 * place + 3]
        return (
            vector[start:middle].reshape(*shape.lead, rank, shape.d_in),
            vector[middle:end].reshape(*shape.lead, rank, shape.d_out).swapaxes(-1, -2),
        )

    def pairs(self, vector: NDArray[np.generic], feature: int) -> dict[str, Pair]:
        """All pairs of a feature by layer, as views of its vector; without those of rank 0."""
        return {
            path: self.views(vector, feature, place)
            for path, place in self.places.items()
            if self.rank(feature, place)
        }


def flat_layout(config: FlixConfig, shapes: Mapping[str, LayerShape]) -> FlatLayout:
    """The layout of the features of a configuration in some layers, in their order."""
    places = {path: place for place, path in enumerate(shapes)}
    return FlatLayout(places, tuple(shapes.values()), tuple(config.layouts(shapes).values()))
