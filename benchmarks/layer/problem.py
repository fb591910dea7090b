"""One layer's problem: its arrays, features and rows, the same for every framework and candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import flix
from benchmarks.guards import Pair, reference

RANK, ACTIVE = 8, 2
SHAPES = ((768, 16, 64), (2048, 8, 128))  # (d, batch, length)
GROWTH = (25, 100, 500, 2000, 10_000)
DRAWN = 12
"""Rows take their language from the first 12, and their task likewise, however many are registered."""

Feature = tuple[str, str]


@dataclass
class Problem:
    """A frozen layer, its input, and the rows that route it.

    Attributes:
        x, dy: ``[batch, length, d]``, the input and the gradient of the output.
        weight, bias: ``[d, d]`` as torch has it, and ``[d]``.
        registry: the registered features.
        rows: the active features of each row.
        pairs: A and B of the features that rows use.
        rank: of every feature.
    """

    x: NDArray[np.float32]
    dy: NDArray[np.float32]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    registry: flix.FeatureRegistry
    rows: list[list[Feature]]
    pairs: dict[Feature, Pair]
    rank: int

    @property
    def d(self) -> int:
        """Input and output size."""
        return int(self.x.shape[-1])

    @property
    def config(self) -> flix.FlixConfig:
        """flix's configuration."""
        return flix.FlixConfig(registry=self.registry, ranks=self.rank)

    @property
    def ids(self) -> NDArray[np.int32]:
        """The rows as flix routes them, ``[batch, width]``."""
        width = max(map(len, self.rows))
        ids = np.full((len(self.rows), width), -1, np.int32)
        for n, row in enumerate(self.rows):
            ids[n, : len(row)] = [self.registry.id(*feature) for feature in row]
        return ids

    def expected(self) -> dict[str, Any]:
        """Output and gradients from the definition."""
        return reference(self.x, self.dy, self.weight, self.bias, self.pairs, self.rows)

    def plain(self) -> dict[str, Any]:
        """The frozen layer's output and gradient."""
        return reference(
            self.x, self.dy, self.weight, self.bias, {}, [[] for _ in range(len(self.rows))]
        )


def make_registry(features: int) -> flix.FeatureRegistry:
    """Half languages, half tasks."""
    tasks = features // 2
    return flix.FeatureRegistry(
        {
            "language": [f"l{i}" for i in range(features - tasks)],
            "task": [f"t{i}" for i in range(tasks)],
        }
    )


def make_problem(
    d: int,
    batch: int,
    length: int,
    features: int = 25,
    *,
    rank: int = RANK,
    width: int = ACTIVE,
    drawn: int = DRAWN,
    seed: int = 0,
) -> Problem:
    """A problem; rows, values and used features are the same however many features are registered.

    Args:
        d: input and output size.
        batch, length: rows and positions a row.
        features: how many are registered.
        rank: of every feature.
        width: active features of a row, languages and tasks in turn.
        drawn: of each group, how many of the first features rows draw from.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    registry = make_registry(features)
    drawn_from = [
        (group, min(drawn, sum(owner == group for owner, _ in registry.features)), count)
        for group, count in (("language", (width + 1) // 2), ("task", width // 2))
    ]
    rows = [
        [
            (group, f"{group[0]}{i}")
            for group, names, count in drawn_from
            for i in rng.choice(names, min(count, names), replace=False)
        ]
        for _ in range(batch)
    ]

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    used = sorted({feature for row in rows for feature in row})
    pairs = {f: Pair(normal(rank, d) * 0.05, normal(d, rank) * 0.05) for f in used}
    return Problem(
        normal(batch, length, d),
        normal(batch, length, d),
        normal(d, d) / np.float32(d**0.5),
        normal(d) * np.float32(0.1),
        registry,
        rows,
        pairs,
        rank,
    )
