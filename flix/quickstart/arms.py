"""The quickstart's arms: two FLix mixtures and the two LoRAs they are held against. Pure.

Ranks and policies follow what was found in trials: features that several datasets share (a task's family, one feature
that all share) are what make the mixture work; the language feature is dropped in half of the training rows, so that
tasks do without it; and where a language and a task were never trained together, the language's update is left out.

Both LoRAs are one feature that every row activates, which is what a LoRA is; they run through the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flix

from .data import Cell, QuickstartData

#: Every linear layer except the head, as the prototype adapted them.
TARGETS = "all-linear"
SHARED = ("shared", "all")


@dataclass(frozen=True)
class Arm:
    """One method of the comparison.

    Attributes:
        name: short, for files and columns.
        title: for people.
        groups: rank by feature group.
        learning_rate: the peak, chosen on dev for each arm by itself.
        language_dropout: rate at which a training row loses its language feature.
        unseen_weights: factors by group for combinations never trained.
    """

    name: str
    title: str
    groups: Mapping[str, int]
    learning_rate: float
    language_dropout: float = 0.0
    unseen_weights: Mapping[str, float] = field(default_factory=dict)

    def row(self, cell: Cell) -> dict[str, str]:
        """What an example of a cell activates; the rest is implied."""
        row = {"language": cell.language, "task": cell.task}
        named = {group: name for group, name in row.items() if group in self.groups}
        return named or {"shared": "all"}


FLIX = Arm(
    "flix",
    "FLix, language + task + family + shared",
    {"language": 1, "task": 2, "family": 4, "shared": 8},
    learning_rate=5e-3,
    language_dropout=0.5,
    unseen_weights={"language": 0.0},
)
PLAIN = Arm(
    "flix-plain",
    "FLix, language + task",
    {"language": 2, "task": 3},
    learning_rate=5e-3,
    language_dropout=0.5,
    unseen_weights={"language": 0.0},
)


def lora(name: str, title: str, rank: int, learning_rate: float) -> Arm:
    """One LoRA for everything."""
    return Arm(name, f"{title}, rank {rank}", {"shared": rank}, learning_rate)


def registry(data: QuickstartData, groups: Sequence[str]) -> flix.FeatureRegistry:
    """The features of an arm: a task implies its family, and whatever a row names implies the shared feature."""
    names: dict[str, list[str]] = {
        "language": list(data.languages),
        "task": list(data.tasks),
        "family": list(data.families),
        "shared": ["all"],
    }
    implies: dict[Any, list[Any]] = {}
    if "family" in groups:
        for task, family in data.family_of_task.items():
            implies[("task", task)] = [("family", family)]
    if "shared" in groups:
        for group in ("language", "family" if "family" in groups else "task"):
            if group in groups:
                implies[(group, "*")] = [SHARED]
    return flix.FeatureRegistry({group: names[group] for group in groups}, implies=implies)


def config(data: QuickstartData, arm: Arm, seed: int) -> flix.FlixConfig:
    """The configuration of an arm."""
    features = registry(data, list(arm.groups))
    dropout = None
    if arm.language_dropout and "language" in arm.groups:
        dropout = flix.FeatureDropout(0.0, per_group={"language": arm.language_dropout})
    return flix.FlixConfig(
        registry=features,
        ranks=flix.ranks.by_group(**arm.groups),
        target_modules=TARGETS,
        feature_dropout=dropout,
        seed=seed,
    )


def budgets(data: QuickstartData, arm: Arm) -> tuple[int, int]:
    """The largest sum of active ranks of any cell, and the sum of all ranks: what the two LoRAs match."""
    settings = config(data, arm, seed=0)
    routing = settings.registry.encode([arm.row(cell) for cell in data.cells])
    ranks: Mapping[Any, int] = settings.ranks  # type: ignore[assignment]
    by_id = [ranks[feature] for feature in settings.registry.features]
    active = max(sum(by_id[i] for i in row if i >= 0) for row in routing.ids.tolist())
    return active, sum(by_id)


def arms(data: QuickstartData) -> tuple[Arm, ...]:
    """All arms: the mixture, the plain mixture, and LoRAs matched to the first in compute and in parameters."""
    compute, parameters = budgets(data, FLIX)
    return (
        FLIX,
        PLAIN,
        lora("lora-compute", "LoRA, equal compute", compute, learning_rate=5e-3),
        lora("lora-parameters", "LoRA, equal parameters", parameters, learning_rate=5e-3),
    )
