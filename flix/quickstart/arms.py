"""The quickstart's arms: a FLix mixture and the two LoRAs it is compared with, as configurations of ``flix train``.

Ranks and other choices follow from trials. The mixture works because datasets share features: a task's family, and one
that all rows have. The language feature is dropped in half of the training rows, so that tasks learn to do without it.
If a language and a task were never trained together, the language's update is left out.

Each LoRA is one feature that every row activates, and the other features have rank 0. So all arms run through the same
code, on the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import QuickstartData

BASE = Path(__file__).parent / "base"
#: Rows of a step.
BATCH = 32
LANGUAGE_DROPOUT = 0.5


@dataclass(frozen=True)
class Arm:
    """One method of the comparison.

    Attributes:
        name: a short name, for files.
        title: the name that people read.
        ranks: the rank of each feature group.
        learning_rate: the peak of the learning rate, chosen on dev for each arm separately.
    """

    name: str
    title: str
    ranks: Mapping[str, int]
    learning_rate: float

    def active(self) -> int:
        """The rank that a row activates; every row has one feature of every group."""
        return sum(self.ranks.values())

    def total(self, data: QuickstartData) -> int:
        """The ranks of all features together."""
        counts = {"language": len(data.languages), "task": len(data.tasks), "family": len(data.families), "shared": 1}  # fmt: skip
        return sum(rank * counts[group] for group, rank in self.ranks.items())


FLIX = Arm(
    "flix",
    "FLix, language + task + family + shared",
    {"language": 1, "task": 4, "family": 4, "shared": 4},
    learning_rate=4e-3,
)


def lora(name: str, title: str, rank: int, learning_rate: float) -> Arm:
    """One LoRA for everything."""
    ranks = {"language": 0, "task": 0, "family": 0, "shared": rank}
    return Arm(name, f"{title}, rank {rank}", ranks, learning_rate)


def arms(data: QuickstartData) -> tuple[Arm, ...]:
    """All arms: the mixture, and LoRAs matched to it in parameters and in compute."""
    return (
        FLIX,
        lora("lora-parameters", "LoRA, equal parameters", FLIX.total(data), 2.5e-3),
        lora("lora-compute", "LoRA, equal compute", FLIX.active(), 5e-3),
    )


def configuration(
    data: QuickstartData, arm: Arm, *, seed: int, steps: int, limit: int | None, output: Path
) -> dict[str, Any]:
    """The configuration for ``flix train``.

    Args:
        data: the quickstart's data.
        arm: the method.
        seed: the seed of initial values, batches and feature dropout.
        steps: optimizer steps.
        limit: how many test examples of each cell to use; None for all.
        output: the folder of the run.
    """
    rows = str(data.folder.resolve() / "{task}" / "{language}")
    return {
        "model": str(BASE),
        "kind": "seq2seq",
        "output": str(output.resolve()),
        "datasets": [
            {
                "name": "quickstart",
                "files": f"{rows}.train.jsonl",
                "eval_files": f"{rows}.test.jsonl",
            }
        ],
        "held_out": [{"language": c.language, "task": c.task} for c in data.zero_shot()],
        # A task brings its family, and every family the feature that all share.
        "implies": {
            **{f"task={task}": f"family={family}" for task, family in data.family_of_task.items()},
            "family=*": "shared=all",
        },
        "ranks": {"rule": "by_group", **arm.ranks},
        "feature_dropout": {"per_group": {"language": LANGUAGE_DROPOUT}},
        "temperature": 2.0,
        "seed": seed,
        "training": {
            "steps": steps,
            "batch_size": BATCH,
            "learning_rate": arm.learning_rate,
            "warmup_ratio": 0.05,
            "similar_lengths": True,
            "threads": 1,
            "device": "cpu",
        },
        "evaluation": {
            "batch_size": 256,
            "max_new_tokens": 50,
            "limit": limit,
            "unseen_group_weights": {"language": 0.0},
            "left_out": False,
        },
    }
