"""Broken where another backend tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from flix_conformance.checks.files import description, pack, unpack
from flix_numpy import Primitives
from flix_numpy.conformance import AdamW, Harness

from flix.backends.verbs import Verbs
from flix.core.adapter.initial import initial_a
from mutants._registry import ChangedFactors, ChangedGradients, mutant
from mutants.training import dropped


@mutant("loses a thousandth of the update", "cross_forward")
class AlmostScale(ChangedFactors):
    def factor(self, factor: Any, feature: Any, x: Any) -> Any:
        return factor * factor.dtype.type(0.999)


@mutant("clips gradients", "cross_gradients")
class ClipsGradients(ChangedGradients):
    def change(self, feature: Any, a: Any, b: Any, x: Any) -> Any:
        return a.clip(-1, 1), b.clip(-1, 1)


@mutant("warms the learning rate up", "cross_trajectory")
class WarmsUp(AdamW):
    steps = 0

    def step(self, gradients: Any) -> None:
        self.steps += 1
        full = self.settings
        self.settings = replace(full, lr=full.lr * min(1, self.steps / 3))
        super().step(gradients)
        self.settings = full


@mutant("merges into a kernel in half precision", "cross_merge")
class HalfMerge(Verbs):
    def merge(self, model: Any, row: Any) -> Any:
        merged = super().merge(model, row)
        for layer in merged.values():
            layer.kernel = layer.kernel.astype(np.float16)
        return merged


@mutant("draws A by the layer's size, not by its path", "cross_initial")
class OtherKey(Primitives):
    def attach(self, model: Any, config: Any, paths: Any, strategy: str, values: Any) -> Any:
        def other(path: str, shape: Any) -> Any:
            key = {"seed": config.seed, "layer": f"{shape.d_in} -> {shape.d_out}"}
            return {
                (group, name): (
                    initial_a(**key, group=group, feature=name, rank=len(a), d_in=shape.d_in),
                    b,
                )
                for (group, name), (a, b) in values(path, shape).items()
            }

        return super().attach(model, config, paths, strategy, other)


@mutant("seeds dropout by the process", "cross_masks")
class OtherSeed(Harness):
    def dropout(self, config: Any, ids: Any, weights: Any, **place: int) -> Any:
        return dropped(config, ids, weights, {**place, "seed": place["seed"] + 1})


@mutant("writes the description of its files in another way", "cross_files")
class OtherDescription(Verbs):
    def save(self, model: Any, directory: Any, features: Any = None, **options: Any) -> None:
        super().save(model, directory, features, **options)
        path = directory / "flix.safetensors"
        said = description(path.read_bytes())
        said["config"]["target_modules"] = "all-linear"
        path.write_bytes(pack(unpack(path.read_bytes()), said))
