"""Training one arm: the base, adapted, on batches that mix all cells."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flix
from flix.backends.torch import adapt, trainable_parameters

from . import tokens
from .arms import Arm, config
from .data import Cell, QuickstartData, sampling_probabilities

BASE = Path(__file__).parent / "base"
OnStep = Callable[[int, float], None]
_POOL = 16


def load_base(folder: Path = BASE) -> Any:
    """The pretrained base in float32."""
    from transformers import T5Config, T5ForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    settings = T5Config.from_pretrained(folder)
    # The same function as T5's "gelu_new", in one fused operation: a quarter of a step on a CPU.
    settings.dense_act_fn = "gelu_pytorch_tanh"
    return T5ForConditionalGeneration.from_pretrained(folder, config=settings, dtype=torch.float32)


class Mixture:
    """Batches drawn from the trained cells with probability proportional to the root of their sizes.

    Args:
        cells: the cells to train on; held-out cells are refused.
        seed: of the draws.

    Raises:
        ValueError: a held-out cell.
    """

    def __init__(self, cells: list[Cell], seed: int) -> None:
        for cell in cells:
            if cell.held_out is not None:
                raise ValueError(f"cell {cell.name} is held out; it must never be trained on")
        self.cells = cells
        self.probabilities = sampling_probabilities([len(cell.train) for cell in cells])
        self.seed = seed

    def batch(self, step: int, size: int) -> tuple[list[Cell], list[Any]]:
        """The cells and the examples of one step: a function of (seed, step).

        Examples are drawn for some steps at a time and dealt out by length, which halves the padding; each batch
        still mixes cells.
        """
        pool, place = divmod(step, _POOL)
        rng = np.random.default_rng((self.seed, pool))
        drawn = rng.choice(len(self.cells), size=size * _POOL, p=self.probabilities)
        pairs = [
            (self.cells[i], self.cells[i].train[rng.integers(len(self.cells[i].train))])
            for i in drawn
        ]
        pairs.sort(key=lambda pair: (len(pair[1].source.encode()), len(pair[1].target.encode())))
        start = int(rng.permutation(_POOL)[place]) * size
        chosen = pairs[start : start + size]
        return [cell for cell, _ in chosen], [example for _, example in chosen]


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 percent of the steps, then a cosine to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_arm(
    data: QuickstartData,
    arm: Arm,
    *,
    seed: int,
    steps: int,
    batch: int = 64,
    base: Path = BASE,
    on_step: OnStep | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Train one arm.

    Args:
        data: the quickstart's data.
        arm: the method.
        seed: of initial values, batches and feature dropout.
        steps: optimizer steps.
        batch: rows a step; they mix cells freely.
        base: the base model's folder.
        on_step: called with (step, loss) after every step.

    Returns:
        The adapted model in evaluation mode, and figures of the run.
    """
    torch.manual_seed(seed)
    settings = config(data, arm, seed)
    # One composition for all rows is the whole of a LoRA; a mixture picks its strategy from the shapes.
    single = len(settings.registry) == 1
    model = adapt(load_base(base), settings, strategy="single" if single else "auto").train()
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=arm.learning_rate, weight_decay=0.0, fused=True)
    mixture = Mixture(list(data.trained()), seed)
    dropout = settings.feature_dropout
    losses: list[float] = []
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, arm.learning_rate)
        cells, examples = mixture.batch(step, batch)
        routing = settings.registry.encode([arm.row(cell) for cell in cells])
        if dropout is not None:
            routing = dropout(routing, seed=seed, step=step)
        loss = model(**_batch(examples), flix_features=routing).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(step + 1, losses[-1])
    figures = {
        "steps": steps,
        "seconds": round(time.monotonic() - began, 1),
        "trainable": sum(p.numel() for p in parameters),
        "loss": round(float(np.mean(losses[-50:])), 4) if losses else None,
    }
    return model.eval(), figures


def _batch(examples: list[Any]) -> dict[str, torch.Tensor]:
    ids, mask = tokens.encode([example.source for example in examples])
    targets = tokens.labels([example.target for example in examples])
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(targets),
    }


def routing_of(settings: flix.FlixConfig, arm: Arm, cells: list[Cell]) -> flix.Routing:
    """The routing that serves examples of these cells: unseen combinations get the arm's unseen weights."""
    seen = settings.registry.encode([arm.row(cell) for cell in cells], width=len(arm.groups))
    if not arm.unseen_weights:
        return seen
    weights = {g: w for g, w in arm.unseen_weights.items() if g in arm.groups}
    unseen = settings.registry.encode(
        [arm.row(cell) for cell in cells], width=len(arm.groups), group_weights=weights
    )
    new = np.array([cell.held_out is not None for cell in cells])[:, None]
    return flix.Routing(seen.ids, np.where(new, unseen.weights, seen.weights), settings.registry)
