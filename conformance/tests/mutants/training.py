"""Broken training, dropout and files."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from flix_numpy import Harness, Layer

import flix
from flix.core.adapter.adapter import LayerShape
from mutants._registry import mutant


@mutant("draws A from numpy's generator", "initial_values")
class OtherGenerator(Layer):
    def fresh(self, feature: Any) -> Any:
        a, b = super().fresh(feature)
        bound = 1 / np.sqrt(a.shape[1])
        return [np.random.default_rng(0).uniform(-bound, bound, a.shape).astype(a.dtype), b]


@mutant("starts B off zero", "initial_values")
class NonZeroB(Layer):
    def fresh(self, feature: Any) -> Any:
        a, b = super().fresh(feature)
        return [a, b + np.float32(1e-6)]


def dropped(config: Any, ids: Any, weights: Any, place: Any, **changes: Any) -> tuple[Any, Any]:
    dropout = replace(config.feature_dropout, **changes)
    routing = dropout(flix.Routing(ids, weights, config.registry), **place)
    return routing.ids, routing.weights


@mutant("rescales after dropout although it was not asked to", "dropout_masks")
class AlwaysRescales(Harness):
    def dropout(self, config: Any, ids: Any, weights: Any, **place: int) -> Any:
        return dropped(config, ids, weights, place, rescale=True)


@mutant("draws the same mask at every step", "dropout_masks")
class SameMask(Harness):
    def dropout(self, config: Any, ids: Any, weights: Any, **place: int) -> Any:
        return dropped(config, ids, weights, {**place, "step": 0})


@mutant("counts rows from 0 in every part of a batch", "dropout_masks")
class ForgetsFirstRow(Harness):
    def dropout(self, config: Any, ids: Any, weights: Any, **place: int) -> Any:
        return dropped(config, ids, weights, {**place, "first_row": 0})


@mutant("lets weight decay move absent features", "absent_stay")
class DecaysAbsent(Layer):
    def adamw(self, gradients: Any, s: Any) -> None:
        super().adamw(gradients, s)
        for feature, pair in self.pairs.items():
            if feature not in gradients:
                self.pairs[feature] = [p * p.dtype.type(1 - s.lr * s.decay) for p in pair]


@mutant("lets momentum move absent features", "absent_stay")
class MomentumMovesAbsent(Layer):
    def adamw(self, gradients: Any, s: Any) -> None:
        absent = {f: [np.zeros_like(p) for p in pair] for f, pair in self.pairs.items()}
        seen = {f for f, _ in self.moments}
        super().adamw({f: g for f, g in absent.items() if f in seen} | gradients, s)


@mutant("adds decay to the gradient (Adam with L2)", "trajectory")
class CoupledDecay(Layer):
    def adamw(self, gradients: Any, s: Any) -> None:
        coupled = {
            f: [g + s.decay * p for g, p in zip(pair, self.pairs[f], strict=True)]
            for f, pair in gradients.items()
        }
        super().adamw(coupled, replace(s, decay=0.0))


@mutant("corrects Adam's bias by the steps of all features", "trajectory")
class CommonCount(Layer):
    steps = 0

    def adamw(self, gradients: Any, s: Any) -> None:
        for key, (m, v, _) in self.moments.items():
            self.moments[key] = (m, v, self.steps)
        for feature in gradients:
            for part in (0, 1):
                self.moments.setdefault((feature, part), (0, 0, self.steps))
        super().adamw(gradients, s)
        self.steps += 1


@mutant("stores B transposed", "files_round_trip")
class StoresTransposed(Harness):
    def save(self, case: Any, folder: Any) -> None:
        turned = {f: (a, b.reshape(b.shape[::-1]).T.copy()) for f, (a, b) in case.pairs.items()}
        super().save(case.but(pairs=turned), folder)


@mutant("stores values in half precision", "files_round_trip")
class StoresHalves(Harness):
    def save(self, case: Any, folder: Any) -> None:
        halves = {
            f: tuple(p.astype(np.float16).astype(p.dtype) for p in pair)
            for f, pair in case.pairs.items()
        }
        super().save(case.but(pairs=halves), folder)


@mutant("loads nothing and keeps its initial values", "files_round_trip")
class LoadsNothing(Harness):
    def load(self, case: Any, folder: Any) -> Any:
        super().load(case, folder)
        return {f: tuple(pair) for f, pair in self.plain(case).pairs.items()}


@mutant("starts afresh where a file is damaged", "files_refused")
class IgnoresDamage(Harness):
    def load(self, case: Any, folder: Any) -> Any:
        try:
            return super().load(case, folder)
        except ValueError:
            return self.plain(case).pairs


@mutant("does not look whether the adapter's sizes are the layer's", "files_refused")
class AnySizes(Harness):
    def load(self, case: Any, folder: Any) -> Any:
        path = folder / "flix_config.json"
        text = json.loads(path.read_text(encoding="utf-8"))
        shape = LayerShape(case.d_in, case.d_out, case.kind)
        text["layers"] = {case.path: vars(shape)}
        path.write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
        return super().load(case, folder)
