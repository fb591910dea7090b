"""The mixed batch of the model benchmarks: 16 rows over 12 compositions of 25 features, the same for all frameworks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

import flix
from benchmarks.layer.problem import ACTIVE, RANK, Feature, make_registry

ROWS, COMPOSITIONS, FEATURES = 16, 12, 25
LORA_RANK = ACTIVE * RANK
"""The rank of one LoRA that does as much work a row."""


class MixedBatch:
    """Rows and their compositions.

    Attributes:
        registry: 13 languages and 12 tasks.
        rows: (language, task) of each row, shuffled: every composition once, some of them twice.
        ids: the rows as flix routes them.
        groups: the numbers of the rows of each composition.
    """

    def __init__(self, rows: int = ROWS, compositions: int = COMPOSITIONS) -> None:
        rng = np.random.default_rng(0)
        self.registry = make_registry(FEATURES)
        languages = [f for f in self.registry.features if f[0] == "language"]
        tasks = [f for f in self.registry.features if f[0] == "task"]
        pairs = [(language, task) for language in languages for task in tasks]
        chosen = [pairs[i] for i in rng.choice(len(pairs), compositions, replace=False)]
        order = rng.permutation(np.arange(rows) % compositions)
        self.rows: list[tuple[Feature, Feature]] = [chosen[i] for i in order]
        self.ids: NDArray[np.int32] = np.asarray(
            [[self.registry.id(*feature) for feature in row] for row in self.rows], np.int32
        )
        self.groups: dict[tuple[Feature, Feature], list[int]] = {}
        for number, row in enumerate(self.rows):
            self.groups.setdefault(row, []).append(number)

    @property
    def config(self) -> flix.FlixConfig:
        """flix's configuration: all linear layers but the head, as PEFT's "all-linear"."""
        return flix.FlixConfig(registry=self.registry, ranks=RANK)

    @property
    def features(self) -> list[Feature]:
        """The features that rows use, by id."""
        return [self.registry.features[i] for i in np.unique(self.ids)]

    def describe(self) -> str:
        """For the reader."""
        return (
            f"{len(self.rows)} rows over {len(self.groups)} compositions of {FEATURES} features of rank {RANK} (each row one "
            f"language and one task; {len(self.features)} features take part), shuffled"
        )


def randomized(adapter: flix.Adapter) -> flix.Adapter:
    """The adapter with random B, so that its updates are not zero; the same in every framework."""
    rng = np.random.default_rng(1)
    tensors = {
        name: rng.normal(size=value.shape).astype(value.dtype) * value.dtype.type(0.02)
        if name.rsplit(".", 3)[1] == "B"
        else value
        for name, value in sorted(adapter.tensors.items())
    }
    return replace(adapter, tensors=tensors)
