"""Evaluating an arm: greedy answers for every cell in mixed batches, exact match and chrF."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import tokens
from .arms import Arm
from .data import Cell, QuickstartData
from .training import routing_of


@dataclass(frozen=True)
class Answer:
    """One prediction beside its reference."""

    cell: str
    source: str
    target: str
    predicted: str


@torch.no_grad()
def answers(
    model: Any, arm: Arm, items: list[tuple[Cell, Any]], batch: int = 256, longest: int = 72
) -> list[Answer]:
    """Greedy answers for (cell, example) items, in their order; every batch mixes cells."""
    order = sorted(range(len(items)), key=lambda i: len(items[i][1].source.encode()))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        ids, mask = tokens.encode([items[i][1].source for i in chosen])
        routing = routing_of(model.flix_config, arm, [items[i][0] for i in chosen])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            produced = model.generate(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                flix_features=torch.from_numpy(routing.ids),
                flix_weights=torch.from_numpy(routing.weights),
                max_new_tokens=longest,
                do_sample=False,
                num_beams=1,
            )
        for i, text in zip(chosen, tokens.decode(produced[:, 1:].numpy()), strict=True):
            found[i] = text
    return [
        Answer(cell.name, example.source, example.target, found[i])
        for i, (cell, example) in enumerate(items)
    ]


def evaluate(
    model: Any, arm: Arm, data: QuickstartData, split: str, limit: int | None = None
) -> tuple[dict[str, dict[str, float]], list[Answer]]:
    """Scores by cell on a split, and the answers.

    Args:
        model: the trained model of the arm.
        arm: the method.
        data: the quickstart's data.
        split: ``"dev"`` (then held-out cells of the test half are left out) or ``"test"``.
        limit: examples a cell at most.
    """
    cells = [c for c in data.cells if split == "test" or c.held_out != "test"]
    items = [(cell, example) for cell in cells for example in getattr(cell, split)[:limit]]
    found = answers(model, arm, items)
    by_cell: dict[str, list[Answer]] = {}
    for answer in found:
        by_cell.setdefault(answer.cell, []).append(answer)
    return {name: scores(group) for name, group in by_cell.items()}, found


def scores(found: Iterable[Answer]) -> dict[str, float]:
    """Exact match and chrF, in percent."""
    from sacrebleu.metrics import CHRF  # type: ignore[attr-defined]

    group = list(found)
    hits = sum(answer.predicted == answer.target for answer in group)
    chrf = CHRF().corpus_score([a.predicted for a in group], [[a.target for a in group]])
    return {
        "exact": 100.0 * hits / len(group),
        "chrf": float(chrf.score),
        "count": float(len(group)),
    }
