"""Broken changes: features that join, leave, are renamed, come from files."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
from flix_numpy import Layer, Primitives

import flix
from flix.backends.verbs import Verbs
from flix.core.adapter.changes import Change
from mutants._registry import ChangedPairs, OptionalHarness, OptionalPrimitives, mutant


def _halves(pair: Any) -> Any:
    return [p.astype(np.float16).astype(p.dtype) for p in pair]


def _numbered(config: Any, features: Any) -> Any:
    """The configuration with ids in another order."""
    names: dict[str, list[str]] = {}
    for group, name in features:
        names.setdefault(group, []).append(name)
    ranks = {feature: config.ranks[feature] for feature in features}
    return flix.FlixConfig(registry=flix.FeatureRegistry(names), ranks=ranks)


class ChangedGrowth(Verbs):
    """A new feature starts with other values."""

    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        raise NotImplementedError

    def add_feature(self, model: Any, group: str, name: str, *rest: Any, **named: Any) -> Any:
        model = super().add_feature(model, group, name, *rest, **named)
        self.grown(model, (group, name), named.get("init_from", ()))
        return model


@mutant("starts a new feature from the negative of the defined values", "added_feature")
class OtherStart(ChangedGrowth):
    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        (layer,) = model.values()
        if not origins:
            a, b = layer.pairs[feature]
            layer.pairs[feature] = [-a, b]


@mutant("rounds the others to half precision when a feature joins", "added_feature")
class RoundsOthers(ChangedGrowth, ChangedPairs):
    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        self.change_pairs(model, lambda f, *pair: pair if f == feature else _halves(pair))


@mutant("numbers features by their names when one joins", "added_feature")
class SortsIds(ChangedGrowth):
    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        config = model.state.config
        model.state.config = _numbered(config, sorted(config.registry.live))


@mutant("scales a new feature by its rank, whatever alpha its group has", "added_feature")
class LosesAlpha(ChangedGrowth):
    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        config = model.state.config
        alpha = config.alpha
        if alpha is not None:
            alpha = alpha if isinstance(alpha, dict) else dict.fromkeys(config.registry.live, alpha)
            alpha = {f: value for f, value in alpha.items() if f != feature}
            model.state.config = replace(config, alpha=alpha or None)


@mutant("forgets what a renamed feature implies", "changed_encoding")
class RenamesWithoutRules(Verbs):
    def rename_feature(self, model: Any, group: str, name: str, new: str) -> Any:
        model = super().rename_feature(model, group, name, new)
        said = model.state.config.to_dict()
        registry = said["registry"]
        registry["implies"] = [r for r in registry["implies"] if [group, new] not in (r[0], *r[1])]
        model.state.config = flix.FlixConfig.from_dict(said)
        return model


@mutant("implies no more than one thing from another", "changed_encoding")
class NoChains(Verbs):
    def add_feature(self, model: Any, group: str, name: str, *rest: Any, **named: Any) -> Any:
        model = super().add_feature(model, group, name, *rest, **named)
        said = model.state.config.to_dict()
        said["registry"]["implies"] = said["registry"]["implies"][:1]
        model.state.config = flix.FlixConfig.from_dict(said)
        return model


@mutant("starts a feature from the sum of others instead of their mean", "added_from_others")
class SumsOrigins(ChangedGrowth):
    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        (layer,) = model.values()
        a, b = layer.pairs[feature]
        layer.pairs[feature] = [a, b * max(len(origins), 1)]


@mutant("fills a new feature up with ranks of 0", "added_from_others")
class FillsWithZeros(ChangedGrowth):
    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        (layer,) = model.values()
        if origins and feature in layer.pairs:
            a, b = layer.pairs[feature]
            layer.pairs[feature] = [np.where(b.any(0)[:, None], a, 0), b]


@mutant("takes the mean of the origins that have an update", "added_from_others")
class LeavesOutOrigins(ChangedGrowth):
    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        (layer,) = model.values()
        known = [name for name in origins if (feature[0], name) in layer.pairs]
        if known and feature in layer.pairs:
            a, b = layer.pairs[feature]
            layer.pairs[feature] = [a, b * b.dtype.type(len(origins) / len(known))]


@mutant("cuts a copy to a lower rank by leaving rows out", "added_from_others")
class DropsRows(ChangedGrowth):
    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        (layer,), config = model.values(), model.state.config
        source = (feature[0], next(iter(origins), ""))
        origin, rank = layer.pairs.get(source), len(layer.pairs[feature][0])
        if len(origins) == 1 and origin is not None and len(origin[0]) > rank:
            ratio = config.scale(layer.path, source) / config.scale(layer.path, feature)
            a, b = origin[0][:rank].copy(), (origin[1][:, :rank] * ratio).astype(np.float32)
            layer.pairs[feature] = [a, b]


@mutant("lets the others train on when a feature joins", "added_trains_alone")
class FreezesNothing(ChangedGrowth):
    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        model.state.frozen = set()


@mutant("freezes the new feature with the others", "added_trains_alone")
class FreezesAll(ChangedGrowth):
    def grown(self, model: Any, feature: Any, origins: Any) -> None:
        model.state.frozen = set(model.state.config.registry.live)


@mutant("closes the gap that a removed feature leaves in the ids", "removed_feature")
class ClosesGaps(Verbs):
    def remove_feature(self, model: Any, group: str, name: str) -> Any:
        model = super().remove_feature(model, group, name)
        model.state.config = _numbered(model.state.config, model.state.config.registry.live)
        return model


@mutant("removes a feature by setting its values to 0", "removed_feature")
class ZeroesRemoved(Primitives):
    def change(self, model: Any, change: Any) -> Any:
        (layer,), before = model.values(), set(model.state.config.registry.live)
        zeroed = {f: [0 * p for p in layer.pairs[f]] for f in before if f in layer.pairs}
        model = super().change(model, change)
        gone = before - set(change.kept.values())
        layer.pairs |= {feature: zeroed[feature] for feature in gone if feature in zeroed}
        return model

    def read(self, model: Any, features: Any = None) -> Any:
        return super().read(model, model[next(iter(model))].pairs if features is None else features)


@mutant("serves the base to rows that name a removed feature", "removed_refused")
class ServesRemoved(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        if ids.dtype.kind == "i":
            gone = np.isin(ids, self.state.config.registry.removed_ids)
            ids = np.where(gone, -1, ids).astype(ids.dtype)
        return super().__call__(x, ids, weights)


@mutant("refuses rows that name a removed feature without naming it", "removed_refused")
class RefusesNameless(Layer):
    def __call__(self, x: Any, ids: Any = None, weights: Any = None) -> Any:
        try:
            return super().__call__(x, ids, weights)
        except ValueError as error:
            if "removed" in str(error):
                raise flix.RoutingError("an id of no feature") from None
            raise


@mutant(
    "serves rows that name a removed feature where it is compiled",
    "removed_refused",
    OptionalPrimitives,
)
class CompilesRemoved(OptionalHarness):
    def compiled_forward(self, model: Any) -> Any:
        def run(batch: Any) -> Any:
            gone = np.isin(batch.ids, model.state.config.registry.removed_ids)
            return self.call(model, replace(batch, ids=np.where(gone, -1, batch.ids)))

        return run


@mutant("gives a renamed feature an id at the end", "renamed_feature")
class RenamedMovesLast(Verbs):
    def rename_feature(self, model: Any, group: str, name: str, new: str) -> Any:
        config, old = model.state.config, (group, name)
        after = config.with_feature(group, new, rank=config.ranks[old]).without_feature(*old)
        kept = {f: f for f in after.registry.live if f != (group, new)}
        return self.primitives.change(model, Change(after, {**kept, (group, new): old}))


@mutant("starts a renamed feature afresh", "renamed_feature")
class RenamesAfresh(Verbs, ChangedPairs):
    def rename_feature(self, model: Any, group: str, name: str, new: str) -> Any:
        model = super().rename_feature(model, group, name, new)
        self.change_pairs(model, lambda f, a, b: (a, 0 * b) if f == (group, new) else (a, b))
        return model


class ChangedLoading(Verbs):
    """Features that come in from a file are spoiled."""

    def loaded(self, model: Any, present: set[Any]) -> None:
        raise NotImplementedError

    def load_features(self, model: Any, source: Any, *rest: Any, **named: Any) -> Any:
        present = set(model.state.config.registry.live)
        model = super().load_features(model, source, *rest, **named)
        self.loaded(model, present)
        return model


@mutant("scales a loaded feature by the model's rule, not as it was trained", "loaded_feature")
class LosesScale(ChangedLoading):
    def loaded(self, model: Any, present: set[Any]) -> None:
        (layer,), config = model.values(), model.state.config
        alpha = {}
        for feature in config.registry.live:
            rank = len(layer.pairs.get(feature, [()])[0])
            plain = rank if config.scaling == "lora" else rank**0.5
            scale = max(config.scale(layer.path, feature), 1e-9)
            alpha[feature] = scale * plain if feature in present else float(max(rank, 1))
        model.state.config = replace(config, alpha=alpha)


@mutant("rounds a loaded feature to half precision", "loaded_feature")
class RoundsLoaded(ChangedLoading, ChangedPairs):
    def loaded(self, model: Any, present: set[Any]) -> None:
        self.change_pairs(model, lambda f, *pair: pair if f in present else _halves(pair))


@mutant("writes every feature where one was asked for", "loaded_feature")
class WritesAll(Verbs):
    def save(self, model: Any, directory: Any, features: Any = None) -> None:
        super().save(model, directory)


@mutant("freezes what it loads", "loaded_trains")
class FreezesLoaded(ChangedLoading):
    def loaded(self, model: Any, present: set[Any]) -> None:
        model.state.frozen = set(model.state.config.registry.live) - present


@mutant("loads A alone into an adapted model", "loaded_again")
class LoadsA(Verbs):
    def load(self, model: Any, directory: Any, rename: Any = None, **options: Any) -> Any:
        before = {p: dict(x.pairs) for p, x in model.items()}
        model = super().load(model, directory, rename, **options)
        for path, layer in model.items():
            for feature, (_, b) in before[path].items():
                layer.pairs[feature] = [layer.pairs[feature][0], b]
        return model


class ChangedConflicts(Verbs):
    """Features that both have are compared or kept in other ways."""

    def load_features(self, model: Any, source: Any, features: Any = None, **named: Any) -> Any:
        before = self.primitives.read(model)
        how = named.pop("conflicts", "error")
        return super().load_features(
            model, source, features, conflicts=self.how(how, model, source, before), **named
        )

    def how(self, how: str, model: Any, source: Any, before: Any) -> str:
        raise NotImplementedError


@mutant("compares A alone where features meet", "conflicts")
class ComparesA(ChangedConflicts):
    def how(self, how: str, model: Any, source: Any, before: Any) -> str:
        theirs = flix.load_adapter(source).tensors
        differs = any(
            not np.array_equal(a, theirs.get(f"{path}.A.{'.'.join(f)}", a))
            for path, own in before.items()
            for f, (a, _) in own.items()
        )
        return how if differs or how != "error" else "keep"


@mutant("keeps its own features where it is told to replace them", "conflicts")
class NeverReplaces(ChangedConflicts):
    def how(self, how: str, model: Any, source: Any, before: Any) -> str:
        return "keep" if how == "replace" else how


@mutant("merges without the features that came from a file", "changed_merge")
class MergesOwn(ChangedLoading):
    own: Any = None

    def loaded(self, model: Any, present: set[Any]) -> None:
        self.own = present

    def merge(self, model: Any, row: Any) -> Any:
        if self.own is not None:
            row = {
                group: {n: w for n, w in names.items() if (group, n) in self.own}
                for group, names in row.items()
                if isinstance(names, dict)
            } or row
        return super().merge(model, row)


@mutant("lets what was compiled before a removal go on as it was", "removed_refused")
class CompilesForGood(OptionalHarness):
    def compiled_forward(self, model: Any) -> Any:
        held = deepcopy(model)
        return lambda batch: self.call(held, batch)
