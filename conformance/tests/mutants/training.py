"""Broken training, dropout and files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
from flix_conformance.checks.files import description, pack, unpack
from flix_numpy import Primitives
from flix_numpy.conformance import AdamW, Harness

import flix
from flix.backends.verbs import Verbs
from flix.core.adapter.initial import initial_pairs
from mutants._registry import ChangedPairs, mutant


class ChangedStart(Primitives):
    """New features start with other values."""

    def start(self, a: Any, b: Any) -> Any:
        raise NotImplementedError

    def attach(self, model: Any, config: Any, paths: Any, strategy: str, values: Any) -> Any:
        def other(path: str, shape: Any) -> Any:
            return {feature: self.start(*pair) for feature, pair in values(path, shape).items()}

        return super().attach(model, config, paths, strategy, other)


@mutant("draws A from numpy's generator", "initial_values")
class OtherGenerator(ChangedStart):
    def start(self, a: Any, b: Any) -> Any:
        bound = 1 / np.sqrt(a.shape[1])
        return np.random.default_rng(0).uniform(-bound, bound, a.shape).astype(a.dtype), b


@mutant("starts B off zero", "initial_values")
class NonZeroB(ChangedStart):
    def start(self, a: Any, b: Any) -> Any:
        return a, b + np.float32(1e-6)


@mutant("lets the last pattern of ranks count", "initial_values")
class LastPattern(Verbs):
    def adapt(self, model: Any, config: Any, **options: Any) -> Any:
        turned = dict(reversed(config.rank_pattern.items()))
        return super().adapt(model, replace(config, rank_pattern=turned), **options)


def dropped(config: Any, ids: Any, weights: Any, place: Any, **changes: Any) -> tuple[Any, Any]:
    dropout = replace(config.feature_dropout, **changes)
    routing = dropout(flix.Routing(ids, weights, config.registry), **place)
    return routing.ids, routing.weights


@mutant("rescales after dropout although it was not asked to", "dropout_masks")
class AlwaysRescales(Harness):
    def dropout(self, config: Any, ids: Any, weights: Any, **place: int) -> Any:
        return dropped(config, ids, weights, place, rescale=True)


@mutant("keeps one of a row's entries, and of its feature no other", "dropout_masks")
class KeepsAnEntry(Harness):
    def dropout(self, config: Any, ids: Any, weights: Any, **place: int) -> Any:
        new, factors = dropped(config, ids, weights, place)
        for row, values in zip(
            new.reshape(-1, new.shape[-1]), factors.reshape(-1, new.shape[-1]), strict=True
        ):
            twice = [i for i, n in enumerate(row) if n >= 0 and n in row[:i]]
            if config.feature_dropout.keep_one and len(set(row[row >= 0])) == 1:
                row[twice], values[twice] = -1, 0
        return new, factors


@mutant("draws the same mask at every step", "dropout_masks")
class SameMask(Harness):
    def dropout(self, config: Any, ids: Any, weights: Any, **place: int) -> Any:
        return dropped(config, ids, weights, {**place, "step": 0})


@mutant("counts rows from 0 in every part of a batch", "dropout_masks")
class ForgetsFirstRow(Harness):
    def dropout(self, config: Any, ids: Any, weights: Any, **place: int) -> Any:
        return dropped(config, ids, weights, {**place, "first_row": 0})


@mutant("lets weight decay move absent features", "absent_stay")
class DecaysAbsent(AdamW):
    def step(self, gradients: Any) -> None:
        super().step(gradients)
        kept = 1 - self.settings.lr * self.settings.decay
        for feature, pair in self.layer.pairs.items():
            if feature not in gradients:
                self.layer.pairs[feature] = [p * p.dtype.type(kept) for p in pair]


@mutant("lets momentum move absent features", "absent_stay")
class MomentumMovesAbsent(AdamW):
    def step(self, gradients: Any) -> None:
        features = self.layer.state.config.registry.features
        seen = {features[number] for number, _ in self.moments}
        absent = {f: [0 * p for p in pair] for f, pair in self.layer.pairs.items() if f in seen}
        super().step(absent | gradients)


@mutant("adds decay to the gradient (Adam with L2)", "trajectory")
class CoupledDecay(AdamW):
    def step(self, gradients: Any) -> None:
        decoupled = self.settings
        self.settings = replace(decoupled, decay=0.0)
        super().step(
            {
                f: [g + decoupled.decay * p for g, p in zip(pair, self.layer.pairs[f], strict=True)]
                for f, pair in gradients.items()
            }
        )
        self.settings = decoupled


@mutant("corrects Adam's bias by the steps of all features", "trajectory")
class CommonCount(AdamW):
    steps = 0

    def step(self, gradients: Any) -> None:
        for feature in gradients:
            number = self.layer.state.config.registry.id(*feature)
            for part in (0, 1):
                m, v, _ = self.moments.get((number, part), (0, 0, 0))
                self.moments[number, part] = (m, v, self.steps)
        super().step(gradients)
        self.steps += 1


@mutant("stores B transposed", "files_round_trip")
class StoresTransposed(Verbs, ChangedPairs):
    def save(self, model: Any, directory: Any, features: Any = None, **options: Any) -> None:
        self.change_pairs(model, lambda f, a, b: (a, b.reshape(b.shape[::-1]).T.copy()))
        super().save(model, directory, features, **options)


@mutant("stores values in half precision", "files_round_trip")
class StoresHalves(Verbs, ChangedPairs):
    def save(self, model: Any, directory: Any, features: Any = None, **options: Any) -> None:
        def halved(feature: Any, *pair: Any) -> Any:
            return [p.astype(np.float16).astype(p.dtype) for p in pair]

        self.change_pairs(model, halved)
        super().save(model, directory, features, **options)


@mutant("forgets the dropout that it was trained with", "files_round_trip")
class ForgetsDropout(Verbs):
    def save(self, model: Any, directory: Any, features: Any = None, **options: Any) -> None:
        model.state.config = replace(model.state.config, feature_dropout=None)
        super().save(model, directory, features, **options)


@mutant("loads nothing and keeps its initial values", "files_round_trip")
class LoadsNothing(Verbs):
    def load(self, model: Any, directory: Any, rename: Any = None, **options: Any) -> Any:
        model = super().load(model, directory, rename, **options)
        (layer,), config = model.values(), model.state.config
        ranks = {f: config.rank(layer.path, f) for f in config.registry.live}
        sizes = {"d_in": layer.shape.d_in, "d_out": layer.shape.d_out}
        layer.pairs = initial_pairs(seed=config.seed, layer=layer.path, ranks=ranks, **sizes)
        return model


@mutant("starts afresh where a file is damaged", "files_refused")
class IgnoresDamage(Verbs):
    def load(self, model: Any, directory: Any, rename: Any = None, **options: Any) -> Any:
        try:
            return super().load(model, directory, rename, **options)
        except ValueError:
            registry = flix.FeatureRegistry({"language": ["hau"]})
            return self.adapt(model, flix.FlixConfig(registry=registry, ranks=1))


@mutant("does not look whether the adapter's sizes are the layer's", "files_refused")
class AnySizes(Verbs):
    def load(self, model: Any, directory: Any, rename: Any = None, **options: Any) -> Any:
        path = directory / "flix.safetensors"
        said, tensors = description(path.read_bytes()), unpack(path.read_bytes())
        said["layers"] = {name: vars(layer.shape) for name, layer in model.items()}
        path.write_bytes(pack(tensors, said))
        return super().load(model, directory, rename, **options)


@mutant("reads the copy of the description that is for people", "files_round_trip")
class ReadsTheCopy(Verbs):
    def load(self, model: Any, directory: Any, rename: Any = None, **options: Any) -> Any:
        json.loads((directory / "flix_config.json").read_text(encoding="utf-8"))
        return super().load(model, directory, rename, **options)


@mutant("removes the old adapter before it writes the new one", "files_one_version")
class RemovesFirst(Verbs):
    def save(self, model: Any, directory: Any, features: Any = None, **options: Any) -> None:
        (directory / "flix.safetensors").unlink(missing_ok=True)
        super().save(model, directory, features, **options)


@mutant("writes the features into the file that is there", "files_one_version")
class WritesInPlace(Verbs):
    def save(self, model: Any, directory: Any, features: Any = None, **options: Any) -> None:
        with TemporaryDirectory() as name:
            super().save(model, name, features, **options)
            data = (Path(name) / "flix.safetensors").read_bytes()
        directory.mkdir(exist_ok=True)
        (directory / "flix_config.json").write_text(json.dumps({}), encoding="utf-8")
        half = len(data) // 2
        for part in (data[:half], data):
            (directory / "flix.safetensors").write_bytes(part)
            with open(directory / "flix.safetensors") as file:
                os.fsync(file.fileno())


@mutant("leaves a file behind at every save that does not end", "files_one_version")
class LeavesFiles(Verbs):
    def save(self, model: Any, directory: Any, features: Any = None, **options: Any) -> None:
        directory.mkdir(exist_ok=True)
        aside = Path(mkdtemp(dir=directory))
        super().save(model, aside, features, **options)
        for name in ("flix.safetensors", "flix_config.json"):
            os.replace(aside / name, directory / name)
        os.rmdir(aside)
