"""Broken exchange: LoRAs in and out, heads, the base, kernels that are folded in; and what changes let go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flix_numpy import Layer, Primitives
from flix_numpy.conformance import AdamW

from flix.backends.verbs import Verbs
from mutants._registry import OptionalPrimitives, mutant


@mutant("takes the scale of every LoRA for 1", "imported")
class ForgetsScale(Verbs):
    def import_peft(self, model: Any, folders: Any, group: str, **options: Any) -> Any:
        for folder in folders.values():
            path = Path(folder) / "adapter_config.json"
            said = json.loads(path.read_text(encoding="utf-8"))
            said |= {"lora_alpha": said["r"], "use_rslora": False}
            path.write_text(json.dumps(said), encoding="utf-8")
        return super().import_peft(model, folders, group, **options)


@mutant("imports A of a LoRA alone into a plain model", "imported")
class ImportsHalf(Verbs):
    def import_peft(self, model: Any, folders: Any, group: str, **options: Any) -> Any:
        plain = model.state is None
        model = super().import_peft(model, folders, group, **options)
        if plain:
            (layer,) = model.values()
            layer.pairs = {f: [a, 0 * b] for f, (a, b) in layer.pairs.items()}
        return model


@mutant("exports every weight as 1", "exported")
class ExportsNoWeights(Verbs):
    def export_peft(self, model: Any, row: Any, directory: Any, **options: Any) -> Any:
        return super().export_peft(model, {g: [*own] for g, own in row.items()}, directory)


@mutant("routes on top of what is merged in place", "merged_in_place")
class RoutesOnTop(Layer):
    def active(self, x: Any, ids: Any, weights: Any) -> Any:
        if ids is not None or not getattr(self.state, "folded", None):
            yield from super().active(x, ids, weights)


@mutant("takes the update off again to unmerge", "merged_in_place")
class TakesOff(OptionalPrimitives):
    def fold(self, model: Any, row: Any, update: Any) -> None:
        super().fold(model, row, update)
        model.updates = {path: update(path).T for path in self.shapes(model)}

    def unfold(self, model: Any) -> None:
        model.state.folded = None
        for path, layer in model.items():
            layer.kernel = (layer.kernel - model.updates[path]).astype(layer.dtype)


@mutant("keeps the head that it had", "trained_files")
class KeepsHeads(OptionalPrimitives):
    def put_heads(self, model: Any, heads: Any) -> Any:
        return model


@mutant("does not save a head again that was loaded", "trained_files")
class ForgetsHeads(OptionalPrimitives):
    def put_heads(self, model: Any, heads: Any) -> Any:
        model = super().put_heads(model, heads)
        for layer in model.values():
            layer.trains = False
        return model


@mutant("loads heads, whatever heads= says", "trained_files")
class LoadsHeads(Verbs):
    def load(self, model: Any, directory: Any, *rest: Any, **options: Any) -> Any:
        return super().load(model, directory, *rest, **{**options, "heads": True})


@mutant("takes any base for its own", "other_base")
class TakesAnyBase(OptionalPrimitives):
    def kernel_samples(self, model: Any, places: Any) -> Any:
        return {path: np.ones(len(at.rows)) for path, at in places.items()}


@mutant("thaws what was frozen before when it freezes more", "frozen_stay")
class FreezesTheLast(Verbs):
    def freeze(self, model: Any, features: Any) -> Any:
        return super().freeze(self.primitives.set_frozen(model, ()), features)


@mutant("lets frozen features decay", "frozen_stay")
class FrozenDecay(AdamW):
    def step(self, gradients: Any) -> None:
        super().step(gradients)
        for feature in gradients.keys() & self.layer.state.frozen:
            self.layer.pairs[feature] = [p * p.dtype.type(0.998) for p in self.layer.pairs[feature]]


@mutant("forgets feature dropout when features change", "changed_settings")
class ForgetsDropout(Primitives):
    def change(self, model: Any, change: Any) -> Any:
        config = replace(change.config, feature_dropout=None)
        return super().change(model, replace(change, config=config))


@mutant("forgets what unknown features fall back to", "changed_settings")
class ForgetsFallbacks(Primitives):
    def change(self, model: Any, change: Any) -> Any:
        return super().change(model, replace(change, config=replace(change.config, unknown="error")))  # fmt: skip
