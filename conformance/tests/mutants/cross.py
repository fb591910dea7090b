"""Broken where another backend tells."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from flix_numpy import Harness, Layer

from flix.core.adapter.initial import initial_a
from mutants._registry import ChangedGradients, mutant
from mutants.training import dropped


@mutant("loses a thousandth of the update", "cross_forward")
class AlmostScale(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        for feature, s, a, b, listed, factor in super().active(x, ids, weights):
            yield feature, s, a, b, listed, factor * factor.dtype.type(0.999)


@mutant("clips gradients", "cross_gradients")
class ClipsGradients(ChangedGradients):
    def change(self, found: Any, x: Any, dy: Any) -> None:
        found["pairs"] = {f: (a.clip(-1, 1), b.clip(-1, 1)) for f, (a, b) in found["pairs"].items()}


@mutant("warms the learning rate up", "cross_trajectory")
class WarmsUp(Layer):
    steps = 0

    def adamw(self, gradients: Any, s: Any) -> None:
        self.steps += 1
        super().adamw(gradients, replace(s, lr=s.lr * min(1, self.steps / 3)))


@mutant("merges into a kernel in half precision", "cross_merge")
class HalfMerge(Harness):
    def merge(self, case: Any, row: Any) -> Any:
        return super().merge(case, row).astype(np.float16)


@mutant("draws A by the layer's size, not by its path", "cross_initial")
class OtherKey(Layer):
    def fresh(self, feature: Any) -> Any:
        a, b = super().fresh(feature)
        seed, (rank, d_in), (group, name) = self.config.seed, a.shape, feature
        key = f"{d_in} -> {self.shape.d_out}"
        return [
            initial_a(seed=seed, layer=key, group=group, feature=name, rank=rank, d_in=d_in),
            b,
        ]


@mutant("seeds dropout by the process", "cross_masks")
class OtherSeed(Harness):
    def dropout(self, config: Any, ids: Any, weights: Any, **place: int) -> Any:
        return dropped(config, ids, weights, {**place, "seed": place["seed"] + 1})


@mutant("writes the description of its files in another way", "cross_files")
class OtherDescription(Harness):
    def save(self, case: Any, folder: Any) -> None:
        super().save(case, folder)
        path = folder / "flix_config.json"
        text = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(text), encoding="utf-8")
