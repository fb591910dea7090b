"""Training steps of a small model, where the host takes longer than the device: mixed rows of many features.

A T5 as ``benchmarks.gpu_study`` pretrains it: 18 million parameters, 75 adapted layers, rows of some tens of bytes. In
training nearly every batch has other features, so what is prepared for a batch's features is prepared in every step.
"""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import torch

import flix
from benchmarks.common import Arm, Table, figure, over
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.record import Record
from flix.backends.torch import adapt, trainable_parameters

SIZE = {"d_model": 384, "d_kv": 64, "d_ff": 1024, "num_layers": 6, "num_decoder_layers": 3, "num_heads": 6}  # fmt: skip
TINY = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}  # fmt: skip
RANK = 15
"""Of a row's features together, and of PEFT's LoRA."""
GROUPS = {"language": 48, "task": 12, "family": 20, "shared": 1}
RANKS = {"language": 1, "task": 2, "family": 4, "shared": 8}
BATCHES = 64
"""Batches whose features differ, by turns."""


def build(dry: bool) -> Any:
    """The model with drawn values, on the host."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    size = TINY if dry else SIZE
    config = T5Config(vocab_size=384, feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0, **size)  # fmt: skip
    return T5ForConditionalGeneration(config)


def routings(registry: flix.FeatureRegistry, rows: int) -> list[Any]:
    """Batches of drawn rows: a language with its family, a task, and what all share."""
    draw, found = random.Random(0), []
    for _ in range(BATCHES):
        batch = []
        for _ in range(rows):
            language, task = draw.randrange(GROUPS["language"]), draw.randrange(GROUPS["task"])
            family = language % GROUPS["family"]
            names = {"language": language, "task": task, "family": family, "shared": 0}
            batch.append({group: str(name) for group, name in names.items()})
        found.append(registry.encode(batch))
    return found


def arm(name: str, model: Any, inputs: dict[str, Any], features: list[Any]) -> Arm:
    """Forward, backward, clipping and fused AdamW, each time with the next of the features."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    turn = itertools.cycle(features or [None])

    def run() -> Any:
        routed = {} if (now := next(turn)) is None else {"flix_features": now}
        loss = model(**inputs, **routed).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Arm(name, run, model=model)


def arms(dry: bool, record: Record, device: str) -> tuple[list[Arm], int]:
    """All candidates, and how many rows they have."""
    rows, length, answer = (4, 6, 3) if dry else (64, 48, 24)
    base = build(dry).to(device).train()
    generator = torch.Generator().manual_seed(1)
    ids, labels = (
        torch.randint(3, 384, (rows, n), generator=generator).to(device) for n in (length, answer)
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    plain = copy.deepcopy(base).requires_grad_(False)
    plain.shared.weight.requires_grad_(True)
    found = [arm("frozen model, gradients to its embedding", plain, inputs, [])]

    def peft() -> None:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        made = get_peft_model(copy.deepcopy(base), settings)
        found.append(arm(f"PEFT, one LoRA of rank {RANK}", made, inputs, []))

    record.attempt("PEFT", peft)
    registry = flix.FeatureRegistry({g: [str(i) for i in range(n)] for g, n in GROUPS.items()})
    config = flix.FlixConfig(registry=registry, ranks=flix.ranks.by_group(**RANKS))
    drawn = routings(registry, rows)
    for name, features in (("the same features", drawn[:1]), ("other features each step", drawn)):
        made = adapt(copy.deepcopy(base), config)
        found.append(arm(f"flix, {name}", made, inputs, features))
    one = flix.FeatureRegistry({"shared": ["all"]})
    made = adapt(copy.deepcopy(base), flix.FlixConfig(registry=one, ranks=RANK))
    every = one.encode([{"shared": "all"}] * rows)
    found.append(arm("flix, one feature", made, inputs, [every]))
    assert all(sum(p.numel() for p in trainable_parameters(a.model)) for a in found[-3:])
    return found, rows


def run(record: Record) -> None:
    """The section."""
    clock = Clock(record.dry)
    made = record.attempt("the models", lambda: arms(record.dry, record, clock.device), needs=15.0)
    if made is None:
        return
    candidates, rows = made

    def timed(arm: Arm) -> float:
        assert bool(arm.run().isfinite()), f"{arm.name}: the loss is not finite"
        return clock.warm(arm, steps=8)

    times = clock.times(candidates, 1 if record.dry else 6, timed)
    base, peft = candidates[0].name, candidates[1].name
    columns = [over(times, base)]
    if peft.startswith("PEFT"):
        columns.append(over(times, peft))
    found = [[a.name, figure(times[a.name]), *(c[a.name] for c in columns)] for a in candidates]
    title = f"A small model: T5 of {SIZE['num_layers']} + {SIZE['num_decoder_layers']} layers, d = {SIZE['d_model']}, float32, {rows} x 48 tokens"  # fmt: skip
    note = (
        "Eight steps in a row, the host's part included, which is most of it here. A row has a language, its family, a task "
        f"and a feature that all rows have; their ranks add up to {RANK}."
    )
    head = ["training step", "ms", "over frozen", *(["over PEFT"] if len(columns) > 1 else [])]
    record.table(Table(title, head, found, note))
    record.put(title, {row[0]: row[1:] for row in found})
