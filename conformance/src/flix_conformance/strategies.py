"""Hypothesis strategies: cases, routing, rows of features, training runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import note
from hypothesis import strategies as st

import flix
from flix_conformance import oracle
from flix_conformance.backend import Backend
from flix_conformance.compare import representable
from flix_conformance.harness import AdamW, Array, Batch, Case, Layer, Stack
from flix_conformance.signatures import (
    PATH,
    Signature,
    chosen_of,
    place,
    signature,
    trainable_signature,
)
from flix_conformance.table import Table

WEIGHTS = (1.0, 0.5, -1.0, 0.0, 2.5, -0.125, 1.0 / 3.0)
_TRIES = 8
"""How often a batch is drawn anew whose gradients are rounding (see ``oracle.clear``)."""
_FEATURES = {"language": ["hau", "swa", "日本語"], "task": ["ner", "pos"]}


@dataclass(frozen=True)
class Profile:
    """How much is tried.

    Attributes:
        name: ``"quick"``, ``"ci"`` or ``"nightly"``.
        examples: a factor for each check's number of examples.
        pool: how many signatures the checks of single outputs draw from.
        fixed: whether the examples are the same in every run.
        shrink: whether a smaller example of a failure is looked for, which can take minutes.
    """

    name: str
    examples: float
    pool: int
    fixed: bool
    shrink: bool


PROFILES = {
    "quick": Profile("quick", 0.2, 24, True, False),
    "ci": Profile("ci", 1, 24, True, False),
    "nightly": Profile("nightly", 20, 400, False, True),
}


@dataclass(frozen=True)
class Draw:
    """What a check draws its examples from.

    Attributes:
        data: hypothesis's ``data()``.
        profile: how much is tried.
        backends: those under test: a case has a dtype and a strategy that all of them have.
        turn, turns: which part of the signatures this example draws from, of how many; left to chance, an edge case
            that only one signature has would seldom come up.
    """

    data: Any
    profile: Profile
    backends: tuple[Backend, ...]
    turn: int = 0
    turns: int = 1

    def __call__(self, strategy: Any) -> Any:
        """One value of a hypothesis strategy."""
        return self.data.draw(strategy)

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, inclusive."""
        return int(self(st.integers(low, high)))

    def one_of(self, choices: Sequence[Any]) -> Any:
        """One of some values."""
        return self(st.sampled_from(list(choices)))

    def generator(self) -> np.random.Generator:
        """A numpy generator with a drawn seed, for dense arrays."""
        return np.random.default_rng(self.integer(0, 10**6))

    def shared(self, attribute: str) -> tuple[str, ...]:
        """Dtypes, strategies or kinds that all backends have, in the first one's order."""
        first, *others = (getattr(backend, attribute) for backend in self.backends)
        return tuple(name for name in first if all(name in other for other in others))

    def case(
        self,
        *,
        kind: str = "linear",
        pool: int | None = None,
        where: Callable[[Signature], bool] = lambda _: True,
        every_way: bool = False,
    ) -> Case:
        """A case of this kind.

        Args:
            kind: ``"linear"`` or ``"embedding"``.
            pool: draw from this many signatures only (laws change shapes, and so compile more); default: the profile's.
            where: which signatures will do.
            every_way: whether those alone must have every strategy in every dtype (they then compile anew).
        """
        count = self.profile.pool if pool is None else self.scaled(pool)
        chosen = [s for s in (signature(i, kind) for i in range(count)) if where(s)]
        number = self.of_turn(range(len(chosen)))
        return self.fill(chosen[number], chosen_of(number, self.ways()) if every_way else None)

    def of_turn(self, choices: Sequence[Any]) -> Any:
        """One of this turn's part of some choices."""
        part = choices[self.turn % min(self.turns, len(choices)) :: self.turns]
        return self.one_of(part)

    def scaled(self, pool: int) -> int:
        """A number of signatures, in proportion to the profile's."""
        return max(pool, pool * self.profile.pool // PROFILES["ci"].pool)

    def ways(self, *dtypes: str) -> list[tuple[str, str]]:
        """Every strategy with every dtype, of some or all, that all backends have together."""
        return [
            (strategy, dtype)
            for strategy in self.shared("strategies")
            for dtype in dtypes or self.shared("dtypes")
            if not any((strategy, dtype) in backend.excluded for backend in self.backends)
        ]

    def trainable(
        self,
        kind: str,
        pool: int,
        where: Callable[[Signature], Any] = lambda _: True,
        dtype: str = "float32",
    ) -> Case:
        """A case that can be trained and changed; the strategies take turns."""
        ways = self.ways(dtype)
        series = range(self.scaled(max(pool, len(ways))))
        fit = [n for n in series if where(trainable_signature(n, kind))]
        number = self.of_turn(fit)
        return self.fill(trainable_signature(number, kind), chosen_of(number, ways))

    def fill(self, chosen: Signature, way: tuple[str, str] | None = None) -> Case:
        """A case with this signature, in this strategy and dtype; else as its number has it."""
        strategy, dtype = way or chosen_of(place(chosen.number, chosen.kind), self.ways())
        rng = self.generator()
        ids, weights = self.routing(chosen, alike=strategy == "single")
        pairs = {}
        holds = "float64" if dtype == "float64" else "float32"
        for feature, rank in zip(chosen.table.features, chosen.ranks, strict=True):
            if rank:
                a, b = rng.normal(size=(rank, chosen.d_in)), rng.normal(size=(chosen.d_out, rank))
                pairs[feature] = (representable(a, holds), representable(b, holds))
        if chosen.kind == "embedding":
            x = rng.integers(0, chosen.d_in, (chosen.batch, *chosen.lead)).astype(np.int32)
        else:
            x = representable(rng.normal(size=(chosen.batch, *chosen.lead, chosen.d_in)), dtype)
        case = Case(
            config=chosen.config,
            table=chosen.table,
            path=PATH,
            kind=chosen.kind,
            kernel=representable(rng.normal(size=(chosen.d_in, chosen.d_out)), dtype),
            bias=representable(rng.normal(size=chosen.d_out), dtype) if chosen.bias else None,
            pairs=pairs,
            x=x,
            ids=ids,
            weights=weights if chosen.weighted else None,
            dtype=dtype,
            strategy=strategy,
        )
        note(repr(case))
        return case

    def routing(self, chosen: Signature, *, alike: bool = False) -> tuple[Array, Array]:
        """Ids and weights in a signature's shape: few compositions, shared among the rows."""
        entry = st.tuples(st.integers(-1, len(chosen.table) - 1), st.sampled_from(WEIGHTS))
        row = st.lists(entry, min_size=chosen.width, max_size=chosen.width)
        compositions = self(st.lists(row, min_size=1, max_size=1 if alike else 3))
        shape = chosen.routed
        count = int(np.prod(shape[:-1]))
        picks = [self.integer(0, len(compositions) - 1) if not alike else 0 for _ in range(count)]
        chosen_rows = [compositions[pick] for pick in picks]
        ids = np.array([[i for i, _ in r] for r in chosen_rows], np.int32).reshape(shape)
        weights = np.array([[w for _, w in r] for r in chosen_rows], np.float32).reshape(shape)
        return ids, np.where(ids < 0, 0, weights).astype(np.float32)

    def stack(
        self,
        paths: Sequence[str],
        targets: Any,
        features: Mapping[str, Sequence[str]] = _FEATURES,
        **settings: Any,
    ) -> Stack:
        """Layers of these names, some of them adapted; every row of the batch lists a feature.

        Args:
            paths: their names.
            targets: the configuration's ``target_modules``; the adapted layers get values if they are given by name.
            features: by group.
            settings: more of the configuration's.
        """
        registry = flix.FeatureRegistry(features)
        ranks = {
            (group, name): self.one_of([1, 2, 3]) for group in features for name in features[group]
        }
        if isinstance(settings.get("ranks"), int):
            ranks = dict.fromkeys(ranks, settings["ranks"])
        strategy, _ = self.of_turn(self.ways("float32"))
        config = flix.FlixConfig(
            registry=registry, target_modules=targets, **{"alpha": 3.0, **settings, "ranks": ranks}
        )
        rng = self.generator()

        def values(*shape: int) -> Array:
            return rng.normal(size=shape).astype(np.float32)

        layers = tuple(
            Layer(path, "linear", values(4, 4), values(4) if i % 2 else None)
            for i, path in enumerate(paths)
        )
        pairs = {
            path: {f: (values(r, 4), values(4, r)) for f, r in ranks.items()}
            for path in paths
            if not isinstance(targets, str) and path in targets
        }
        ids = rng.integers(0, len(ranks), (3, 2)).astype(np.int32)
        weights = rng.choice([0.5, -1.0, 2.0], ids.shape).astype(np.float32)
        if strategy == "single":
            ids[:], weights[:] = ids[:1], weights[:1]
        return Stack(layers, config, pairs, Batch(values(3, 4), ids, weights), strategy)

    def rows(self, table: Table, count: int, *, full: bool = False) -> list[Any]:
        """Rows as users write them; ``full``: each activates something."""
        return [self(composition_rows(table, full)) for _ in range(count)]

    def run(
        self,
        kind: str,
        steps: int,
        pool: int = 4,
        where: Callable[[Signature], Any] = lambda _: True,
        dtype: str = "float32",
    ) -> tuple[Case, list[Batch]]:
        """A training run: a layer, and batches in which some features are absent, one of them empty."""
        case = self.trainable(kind, pool, where, dtype)
        rng = self.generator()
        batches = []
        run, silent = oracle.Run([case], AdamW()), self.integer(1, steps)
        for step in range(steps):
            ids, weights = self._training_routing(case, rng)
            if step == silent:
                ids, weights = np.full_like(ids, -1), np.zeros_like(weights)
            batch = self._batch(case, ids, weights, dtype, rng)
            for _ in range(_TRIES):
                if oracle.clear(run.layers[0], batch):
                    break
                batch = self._batch(case, ids, weights, dtype, rng)
            run.step(batch)
            batches.append(batch)
        return case, batches

    def _batch(
        self, case: Case, ids: Array, weights: Array, dtype: str, rng: np.random.Generator
    ) -> Batch:
        """A training batch under this routing."""
        if case.kind == "embedding":
            x: Array = rng.integers(0, case.d_in, case.x.shape).astype(np.int32)
        else:
            x = representable(rng.normal(size=case.x.shape), dtype)
        target = rng.normal(size=(*case.x.shape[: len(_lead(case))], case.d_out))
        given = weights if case.weights is not None else None
        return Batch(x, ids, given, dtype, target.astype(np.float32))

    def _training_routing(self, case: Case, rng: np.random.Generator) -> tuple[Array, Array]:
        """Few features a batch, each at most once a row: sums that cancel would leave the optimizer noise to follow."""
        total, width = len(case.table), case.ids.shape[-1]
        at_hand = rng.permutation(total)[: max(1, total // 2)]
        ids = np.full((int(np.prod(case.ids.shape[:-1])), width), -1, np.int32)
        for row in ids:
            picked = rng.permutation(at_hand)[: rng.integers(0, width + 1)]
            row[: len(picked)] = picked
        if case.strategy == "single":
            ids[:] = ids[:1]
        weights = rng.choice([1.0, 0.5, -1.0, 2.0], size=ids.shape).astype(np.float32)
        if case.strategy == "single":
            weights[:] = weights[:1]
        weights[ids < 0] = 0.0
        return ids.reshape(case.ids.shape), weights.reshape(case.ids.shape)


def _lead(case: Case) -> tuple[int, ...]:
    return case.x.shape if case.kind == "embedding" else case.x.shape[:-1]


def composition_rows(table: Table, full: bool = False) -> st.SearchStrategy[Any]:
    """One row: for some groups a name, several names, or names with weights."""

    def value(group: str) -> st.SearchStrategy[Any]:
        name = st.sampled_from(table.names(group))
        several = st.lists(name, min_size=1 if full else 0, max_size=3)
        weighted = st.dictionaries(name, st.sampled_from(WEIGHTS), min_size=int(full), max_size=3)
        options = [name, several, weighted]
        return st.one_of(*options) if full else st.one_of(*options, st.none())

    groups = st.lists(st.sampled_from(table.groups), min_size=int(full), max_size=4, unique=True)
    return groups.flatmap(lambda chosen: st.fixed_dictionaries({g: value(g) for g in chosen}))
