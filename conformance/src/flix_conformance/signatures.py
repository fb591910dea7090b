"""Static signatures: registries, ranks and shapes that compiled frameworks specialise on.

Values vary freely from example to example; what makes a framework compile anew comes from a fixed, numbered series,
so that compilations are reused, and number n means the same on every machine.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flix
from flix_conformance.table import Feature, Table

PATH = "proj"
_GROUPS = ("language", "task", "家族", "domain:sub", "domain")
_NAMES = (
    "hau", "swa", "日本語", "língua", "two words", "🙂", "x.y", "%2E", "sub:a", "a", "ner", "β-γ", "/root",
)  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """What is static about a case.

    Attributes:
        config: the configuration.
        table: what the kit itself knows of its features.
        kind: ``"linear"`` or ``"embedding"``.
        ranks: of each feature in the layer.
        d_in, d_out: sizes of the layer.
        bias: whether the layer has a bias.
        batch: B.
        lead: the further dimensions of x but the last, such as [sequence].
        per_token: whether ids are [B, T, W].
        width: W.
        weighted: whether there are weights.
        number: its place in the series; picks the dtype and the strategy (see :func:`chosen_of`).
    """

    config: flix.FlixConfig
    table: Table
    kind: str
    ranks: tuple[int, ...]
    d_in: int
    d_out: int
    bias: bool
    batch: int
    lead: tuple[int, ...]
    per_token: bool
    width: int
    weighted: bool
    number: int

    def __repr__(self) -> str:
        return f"signature({self.number}, {self.kind!r})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis's hook; it would spell a data class out."""
        del cycle
        printer.text(repr(self))

    @property
    def acts(self) -> bool:
        """Whether there are rows, positions and updates."""
        return 0 not in (self.batch, *self.lead) and sum(self.ranks) > 0

    @property
    def filled(self) -> bool:
        """Whether there are weights, positions, and rows (of one row, ids of another number of rows may be legal)."""
        return self.weighted and self.batch > 1 and 0 not in self.lead

    @property
    def routed(self) -> tuple[int, ...]:
        """The shape of the ids."""
        positions = self.lead[:1] if self.per_token else ()
        return (self.batch, *positions, self.width)


_Names = dict[str, list[str]]


def _features(rng: random.Random) -> tuple[_Names, dict[Any, Any]]:
    """Names by group, and what implies what."""
    groups = rng.sample(_GROUPS, rng.randint(1, 4))
    names = {group: rng.sample(_NAMES, rng.randint(1, 4)) for group in groups}
    implies: dict[Any, Any] = {}
    if len(groups) > 1 and rng.random() < 0.5:
        source, target = groups[0], groups[-1]
        name = rng.choice([*names[source], "*"])
        middle = (target, rng.choice(names[target]))
        implies[source, name] = [middle]
        if len(groups) > 2:  # and on from there
            implies[middle] = [(groups[1], rng.choice(names[groups[1]]))]
    return names, implies


def _config(rng: random.Random, names: _Names, implies: dict[Any, Any]) -> dict[str, Any]:
    features = [(group, name) for group, own in names.items() for name in own]
    ranks = {f: rng.choice((0, 1, 1, 2, 3, 5)) for f in features}
    settings: dict[str, Any] = {}
    if rng.random() < 0.3:
        # What the layer gets comes from the first pattern; elsewhere the ranks would be others.
        settings = {"given": 7, "rank_pattern": {PATH: ranks, ".*": dict.fromkeys(ranks, 6)}}
    by_group = {next(iter(names)): 2.5}
    alpha: Any = (None, None, 3.0, by_group)[rng.randrange(4)]
    scaling, seed = rng.choice(("lora", "lora", "rslora")), rng.choice((0, 1, 12345))
    return _told(names, ranks, implies, alpha=alpha, scaling=scaling, seed=seed, **settings)


def _told(
    names: _Names,
    ranks: dict[Feature, int],
    implies: dict[Any, Any] | None = None,
    *,
    alpha: Any = None,
    scaling: str = "lora",
    seed: int = 0,
    given: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """The same features and rules, told to flix and noted down by the kit."""
    rules = {"alpha": alpha, "scaling": scaling, "seed": seed}
    registry = flix.FeatureRegistry(names, implies=implies)
    return {
        "config": flix.FlixConfig(
            registry=registry,
            target_modules=(PATH,),
            **{"ranks": given or ranks, **rules, **settings},
        ),
        "table": Table.of(names, implies=implies, **rules),
        "ranks": tuple(ranks.values()),
    }


@functools.cache
def signature(number: int, kind: str = "linear") -> Signature:
    """The signature with this number. The first few are small and cover the edges; shrinking leads to them."""
    rng = random.Random(f"{number}:{kind}")
    told = _config(rng, *_features(rng))
    lead: tuple[int, ...] = rng.choice(((), (1,), (3,), (3,), (9,), (2, 3)))
    values: dict[str, Any] = {
        "d_in": rng.choice((1, 3, 4, 7, 8, 16)),
        "d_out": rng.choice((1, 2, 5, 8, 9)),
        "bias": kind == "linear" and rng.random() < 0.5,
        "batch": rng.choice((1, 2, 3, 5)),
        "lead": lead,
        "per_token": bool(lead) and rng.random() < 0.35,
        "width": rng.randint(1, 4),
        "weighted": number % 6 != 5,
    }
    edges: dict[int, dict[str, Any]] = {
        0: {"batch": 2, "lead": (3,), "per_token": False, "width": 2, "weighted": True},
        1: {"batch": 2, "lead": (), "per_token": False, "width": 2, "weighted": False},
        2: {"batch": 0, "lead": (3,), "per_token": False},
        3: {"batch": 2, "lead": (0,), "per_token": False},
        4: {"batch": 1, "lead": (9,), "per_token": True, "width": 2},
        5: {"batch": 3, "lead": (1,), "per_token": False},
        6: {"width": 6, "weighted": False},
    }
    if number % 4 == 3:
        values["d_out"] = values["d_in"]  # a kernel the wrong way round fits
    values |= edges.get(number, {})
    if number in (0, 1) or number == 4:
        # Smallest of all, and sure to have something to add.
        scaling = "rslora" if number else "lora"
        own = {("language", "hau"): 2, ("language", "swa"): 1, ("task", "ner"): 3}
        groups = {"language": ["hau", "swa"], "task": ["ner"]}
        told = _told(groups, own, alpha={"task": 1.5}, scaling=scaling)
        values |= {"d_in": 4, "d_out": 5}
    elif number == 8:
        # Names that any way of joining group and name with a colon confuses.
        groups = {"domain": ["sub:a", "b"], "domain:sub": ["a", "b"]}
        features = [(group, name) for group, names in groups.items() for name in names]
        told = _told(groups, dict(zip(features, (1, 2, 3, 0), strict=True)))
    elif number == 7:
        names, implies = _features(random.Random(f"{number}:{kind}"))
        nothing = {(group, name): 0 for group, own_names in names.items() for name in own_names}
        told = _told(names, nothing, implies)
    return Signature(kind=kind, number=number, **told, **values)


@functools.cache
def crowded(features: int, batch: int, width: int) -> Signature:
    """A small layer with many features in two groups, ranks of 0 to 2; every row lists many of them, or few."""
    rng = random.Random(f"{features}:{batch}:{width}")
    names = {
        "language": [f"l{i}" for i in range(features - 20)],
        "task": [f"t{i}" for i in range(20)],
    }
    ranks = {(group, name): rng.choice((1, 1, 2, 0)) for group in names for name in names[group]}
    told = _told(names, ranks, alpha={"language": 2.0, "task": 3.0})
    sizes: dict[str, Any] = {"d_in": 4, "d_out": 5, "bias": True, "batch": batch, "lead": (2,)}
    return Signature(
        kind="linear", number=0, per_token=False, width=width, weighted=True, **told, **sizes
    )


@functools.cache
def wide(kind: str, d_in: int) -> Signature:
    """A layer with so many inputs, or an embedding with so many rows."""
    ranks = {("language", "hau"): 1, ("language", "swa"): 0, ("task", "ner"): 2}
    told = _told({"language": ["hau", "swa"], "task": ["ner"]}, ranks, alpha=2.0)
    sizes: dict[str, Any] = {"d_in": d_in, "d_out": 3, "bias": False, "batch": 2, "lead": (6,)}
    if kind == "linear":
        sizes["lead"] = ()
    return Signature(kind=kind, number=0, per_token=False, width=2, weighted=True, **told, **sizes)


def chosen_of(number: int, choices: Sequence[Any]) -> Any:
    """One of some choices by a signature's number: each once a round, in an order that differs from round to round.

    Dtype and strategy are chosen together in this way, so that every pair of them is tried.
    """
    turn, place = divmod(number, len(choices))
    order = random.Random(f"round {turn} of {len(choices)}").sample(
        range(len(choices)), len(choices)
    )
    return choices[order[place]]


@functools.cache
def place(number: int, kind: str) -> int:
    """What its strategy and dtype go by: its number among the signatures that act, or among those that do not."""
    acts = signature(number, kind).acts
    return sum(signature(i, kind).acts == acts for i in range(number))


@functools.cache
def trainable_signature(number: int, kind: str = "linear") -> Signature:
    """The n-th signature of the series that a layer can be trained with: rows, positions and updates there are."""
    found = -1
    index = 0
    while True:
        candidate = signature(index, kind)
        if candidate.acts and len(candidate.table) >= 3:
            found += 1
            if found == number:
                return candidate
        index += 1
