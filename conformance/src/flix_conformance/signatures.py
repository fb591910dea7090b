"""Static signatures: registries, ranks and shapes that compiled frameworks specialise on.

Values vary freely from example to example; what makes a framework compile anew comes from a fixed, numbered series,
so that compilations are reused, and number n means the same on every machine.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import flix

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
        kind: ``"linear"`` or ``"embedding"``.
        ranks: of each feature in the layer.
        d_in, d_out: sizes of the layer.
        bias: whether the layer has a bias.
        batch: B.
        lead: the further dimensions of x but the last, such as [sequence].
        per_token: whether ids are [B, T, W].
        width: W.
        weighted: whether there are weights.
        number: its place in the series; picks the dtype and the strategy.
    """

    config: flix.FlixConfig
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
    def filled(self) -> bool:
        """Whether there are weights, positions, and rows (of one row, ids of another number of rows may be legal)."""
        return self.weighted and self.batch > 1 and 0 not in self.lead

    @property
    def routed(self) -> tuple[int, ...]:
        """The shape of the ids."""
        positions = self.lead[:1] if self.per_token else ()
        return (self.batch, *positions, self.width)


def _registry(rng: random.Random) -> flix.FeatureRegistry:
    groups = rng.sample(_GROUPS, rng.randint(1, 4))
    names = {group: rng.sample(_NAMES, rng.randint(1, 4)) for group in groups}
    implies: dict[Any, Any] = {}
    if len(groups) > 1 and rng.random() < 0.5:
        source, target = groups[0], groups[-1]
        name = rng.choice([*names[source], "*"])
        implies[source, name] = [(target, rng.choice(names[target]))]
    return flix.FeatureRegistry(names, implies=implies)


def _config(rng: random.Random, registry: flix.FeatureRegistry) -> tuple[flix.FlixConfig, Any]:
    ranks = {f: rng.choice((0, 1, 1, 2, 3, 5)) for f in registry.features}
    settings: dict[str, Any] = {"ranks": ranks}
    if rng.random() < 0.3:
        # What the layer gets comes from the pattern; elsewhere the ranks would be others.
        settings = {"ranks": 7, "rank_pattern": {PATH: dict(ranks)}}
    by_group = {registry.groups[0]: 2.5}
    alpha: Any = (None, None, 3.0, by_group)[rng.randrange(4)]
    config = flix.FlixConfig(
        registry=registry,
        alpha=alpha,
        scaling=rng.choice(("lora", "lora", "rslora")),
        target_modules=(PATH,),
        seed=rng.choice((0, 1, 12345)),
        **settings,
    )
    return config, tuple(ranks[f] for f in registry.features)


@functools.cache
def signature(number: int, kind: str = "linear") -> Signature:
    """The signature with this number. The first few are small and cover the edges; shrinking leads to them."""
    rng = random.Random(f"{number}:{kind}")
    config, ranks = _config(rng, _registry(rng))
    lead: tuple[int, ...] = rng.choice(((), (1,), (3,), (3,), (9,), (2, 3)))
    values: dict[str, Any] = {
        "d_in": rng.choice((1, 3, 4, 7, 8, 16)),
        "d_out": rng.choice((1, 2, 5, 8, 9)),
        "bias": kind == "linear" and rng.random() < 0.5,
        "batch": rng.choice((1, 2, 3, 5)),
        "lead": lead,
        "per_token": bool(lead) and rng.random() < 0.35,
        "width": rng.randint(1, 4),
        "weighted": rng.random() < 0.65,
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
    values |= edges.get(number, {})
    if number in (0, 1) or number == 4:
        # Smallest of all, and sure to have something to add.
        registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["ner"]})
        ranks = (2, 1, 3)
        config = flix.FlixConfig(
            registry=registry,
            ranks=dict(zip(registry.features, ranks, strict=True)),
            alpha={"task": 1.5},
            scaling="rslora" if number else "lora",
            target_modules=(PATH,),
        )
        values |= {"d_in": 4, "d_out": 5}
    elif number == 8:
        # Names that any way of joining group and name with a colon confuses.
        registry = flix.FeatureRegistry({"domain": ["sub:a", "b"], "domain:sub": ["a", "b"]})
        ranks = (1, 2, 3, 0)
        config = flix.FlixConfig(
            registry=registry,
            ranks=dict(zip(registry.features, ranks, strict=True)),
            target_modules=(PATH,),
        )
    elif number == 7:
        ranks = (0,) * len(ranks)
        config = flix.FlixConfig(registry=config.registry, ranks=0, target_modules=(PATH,))
    return Signature(config=config, kind=kind, ranks=ranks, number=number, **values)


@functools.cache
def trainable_signature(number: int, kind: str = "linear") -> Signature:
    """The n-th signature of the series that a layer can be trained with: rows, positions and updates there are."""
    found = -1
    index = 0
    while True:
        candidate = signature(index, kind)
        small = 0 not in (candidate.batch, *candidate.lead) and sum(candidate.ranks) > 0
        if small and len(candidate.config.registry) >= 3:
            found += 1
            if found == number:
                return candidate
        index += 1
