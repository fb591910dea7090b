"""Broken changes: features that join, leave, are renamed, come from files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from flix_numpy import Harness, Layer

import flix
from mutants._registry import mutant


@mutant("starts a new feature from the negative of the defined values", "added_feature")
class OtherStart(Layer):
    def add(self, group: str, name: str, rank: int, init_from: Any) -> None:
        super().add(group, name, rank, init_from)
        if not init_from:
            a, b = self.pairs[group, name]
            self.pairs[group, name] = [-a, b]


@mutant("rounds the others to half precision when a feature joins", "added_feature")
class RoundsOthers(Layer):
    def add(self, group: str, name: str, rank: int, init_from: Any) -> None:
        halves = {f: [p.astype(np.float16) for p in pair] for f, pair in self.pairs.items()}
        self.pairs = {f: [p.astype(np.float32) for p in pair] for f, pair in halves.items()}
        super().add(group, name, rank, init_from)


@mutant("numbers features by their names when one joins", "added_feature")
class SortsIds(Harness):
    grown = False

    def add_feature(self, model: Layer, *arguments: Any) -> None:
        super().add_feature(model, *arguments)
        self.grown = True

    def state(self, model: Layer) -> Any:
        ids, pairs = super().state(model)
        return ({f: i for i, f in enumerate(sorted(ids))} if self.grown else ids), pairs


@mutant("starts a feature from the sum of others instead of their mean", "added_from_others")
class SumsOrigins(Layer):
    def add(self, group: str, name: str, rank: int, init_from: Any) -> None:
        super().add(group, name, rank, init_from)
        a, b = self.pairs[group, name]
        self.pairs[group, name] = [a, b * max(len(init_from), 1)]


@mutant("cuts a copy to a lower rank by leaving rows out", "added_from_others")
class DropsRows(Layer):
    def add(self, group: str, name: str, rank: int, init_from: Any) -> None:
        super().add(group, name, rank, init_from)
        origin = self.pairs.get((group, next(iter(init_from), "")))
        if len(init_from) == 1 and origin is not None and len(origin[0]) > rank:
            ratio = self.config.scale(self.path, (group, init_from[0]))
            ratio /= self.config.scale(self.path, (group, name))
            a, b = origin[0][:rank].copy(), (origin[1][:, :rank] * ratio).astype(np.float32)
            self.pairs[group, name] = [a, b]


@mutant("lets the others train on when a feature joins", "added_trains_alone")
class FreezesNothing(Layer):
    def add(self, group: str, name: str, rank: int, init_from: Any) -> None:
        super().add(group, name, rank, init_from)
        self.frozen = set()


@mutant("freezes the new feature with the others", "added_trains_alone")
class FreezesAll(Layer):
    def add(self, group: str, name: str, rank: int, init_from: Any) -> None:
        super().add(group, name, rank, init_from)
        self.frozen = set(self.pairs)


@mutant("closes the gap that a removed feature leaves in the ids", "removed_feature")
class ClosesGaps(Harness):
    def state(self, model: Layer) -> Any:
        ids, pairs = super().state(model)
        return {f: i for i, f in enumerate(ids)}, pairs


@mutant("removes a feature by setting its values to 0", "removed_feature")
class ZeroesRemoved(Layer):
    def remove(self, group: str, name: str) -> None:
        gone = {(group, name): [0 * p for p in self.pairs.get((group, name), [])]}
        super().remove(group, name)
        self.pairs |= {f: pair for f, pair in gone.items() if pair}


@mutant("serves the base to rows that name a removed feature", "removed_refused")
class ServesRemoved(Layer):
    def forward(self, x: Any, ids: Any, weights: Any = None) -> Any:
        registry = self.config.registry
        gone = [i for i, f in enumerate(registry.features) if f in registry.removed]
        if ids.dtype.kind == "i":
            ids = np.where(np.isin(ids, gone), -1, ids).astype(ids.dtype)
        return super().forward(x, ids, weights)


@mutant("refuses rows that name a removed feature without naming it", "removed_refused")
class RefusesNameless(Layer):
    def forward(self, x: Any, ids: Any, weights: Any = None) -> Any:
        try:
            return super().forward(x, ids, weights)
        except ValueError as error:
            if "removed" in str(error):
                raise flix.RoutingError("an id of no feature") from None
            raise


@mutant("gives a renamed feature an id at the end", "renamed_feature")
class RenamedMovesLast(Harness):
    renamed: Any = None

    def rename_feature(self, model: Layer, group: str, name: str, new: str) -> None:
        super().rename_feature(model, group, name, new)
        self.renamed = (group, new)

    def state(self, model: Layer) -> Any:
        ids, pairs = super().state(model)
        if self.renamed in ids and self.renamed[1] != "renamed":
            ids[self.renamed] = len(model.config.registry)
        return ids, pairs


@mutant("starts a renamed feature afresh", "renamed_feature")
class RenamesAfresh(Layer):
    def rename(self, group: str, name: str, new: str) -> None:
        super().rename(group, name, new)
        if (group, new) in self.pairs and new != "renamed":
            self.pairs[group, new] = self.fresh((group, new))


@mutant("scales a loaded feature by the model's rule, not as it was trained", "loaded_feature")
class LosesScale(Harness):
    def load_features(self, model: Layer, folder: Any) -> None:
        present = set(model.pairs)
        super().load_features(model, folder)
        alpha = {f: model.config.scale(model.path, f) for f in model.config.registry.live}
        for feature, scale in alpha.items():
            rank = len(model.pairs.get(feature, [()])[0])
            plain = rank if model.config.scaling == "lora" else rank**0.5
            alpha[feature] = max(scale, 1e-9) * plain if feature in present else float(max(rank, 1))
        model.config = replace(model.config, alpha=alpha)


@mutant("rounds a loaded feature to half precision", "loaded_feature")
class RoundsLoaded(Harness):
    def load_features(self, model: Layer, folder: Any) -> None:
        present = set(model.pairs)
        super().load_features(model, folder)
        for feature in set(model.pairs) - present:
            halves = [p.astype(np.float16) for p in model.pairs[feature]]
            model.pairs[feature] = [p.astype(np.float32) for p in halves]


@mutant("writes every feature where one was asked for", "loaded_feature")
class WritesAll(Harness):
    def save_features(self, model: Layer, folder: Any, features: Any) -> None:
        flix.save_adapter(model.to_adapter(), folder)


@mutant("merges without the features that came from a file", "changed_merge")
class MergesOwn(Harness):
    own: Any = None

    def load_features(self, model: Layer, folder: Any) -> None:
        self.own = set(model.config.registry.live)
        super().load_features(model, folder)

    def merge(self, case: Any, row: Any) -> Any:
        if self.own is not None:
            row = {
                group: {n: w for n, w in names.items() if (group, n) in self.own}
                for group, names in row.items()
                if isinstance(names, dict)
            } or row
        return super().merge(case, row)
