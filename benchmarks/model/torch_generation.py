"""Greedy generation of a mixed batch: flix, and PEFT's ways to serve rows with different adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import Arm, Figure, Table, figure, interleave, over
from benchmarks.guards import guard
from benchmarks.model import torch_models as models
from benchmarks.model.problem import LORA_RANK, MixedBatch

BASE, FLIX = "base model", "**flix**"
PASSES = "PEFT `adapter_names`, a pass for each of the two features (no sum)"
MERGED = "PEFT `adapter_names`, compositions concatenated beforehand"
SINGLE = f"PEFT, one LoRA of rank {LORA_RANK} for all rows"
LOOP = "PEFT, loop over the batch's compositions"


Generate = Callable[..., Tensor]
"""Generates a number of tokens; with a second number, from so many positions of the prompts."""


class Operations(TorchDispatchMode):
    """Counts the torch operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _arm(
    name: str,
    generate: Generate,
    logits: Callable[[], Tensor | None],
    new: int,
    given: int,
) -> Arm:
    """Generation of ``new`` tokens after ``given``; its results are their number and the logits of one forward.

    The tokens themselves prove little: a model with random weights may well repeat one.
    """

    def results(tokens: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            made = logits()
        count = np.asarray(tokens.shape[-1] - given)
        return {"new tokens": count, "logits": None if made is None else made.numpy()}

    return Arm(name, lambda: generate(new), results)


def tolerance(model: nn.Module) -> float:
    """How far two ways of the same sums may differ in a whole model.

    In float64, in which the smoke run computes, they agree to rounding. In float32 rounding flips the sign of some
    inputs of ReLU, and a gradient that few rows feed moves by some hundredths; the same full-sized T5 agrees to 1e-7 in
    float64.
    """
    return 1e-6 if next(model.parameters()).dtype == torch.float64 else 0.1


def _settings(new: int) -> dict[str, Any]:
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}


def generation_arms(
    make: models.Make, batch: MixedBatch, prompts: Tensor, new: int, peers: bool = True
) -> tuple[list[Arm], dict[str, Generate]]:
    """The candidates, each guarded, and what generates a given number of tokens with each.

    Args:
        make: the model's maker.
        batch: its rows.
        prompts: token ids, all of one length.
        new: tokens to generate.
        peers: whether PEFT's ways to route rows take part, too.
    """
    base, flix_model = make(), models.flix_model(make, batch)
    single = models.peft_single(make)
    built: list[Any] = [base, flix_model, single]
    ids = torch.from_numpy(batch.ids)
    given = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    forward = dict(given)
    if base.config.is_encoder_decoder:
        forward["decoder_input_ids"] = prompts[:, :1]

    def cut(length: int | None) -> dict[str, Tensor]:
        return {name: value[:, :length] for name, value in given.items()}

    def of(model: Any, **more: Any) -> tuple[Generate, Callable[[], Tensor | None]]:
        return (
            lambda n, length=None: model.generate(**cut(length), **_settings(n), **more),
            lambda: model(**forward, **more).logits,
        )

    callables = {BASE: of(base), FLIX: of(flix_model, flix_features=ids), SINGLE: of(single)}
    if peers:
        callables |= _routed_peers(make, batch, flix_model, of, cut, forward, built)
    for model in built:
        model.eval()
    before = 1 if base.config.is_encoder_decoder else prompts.shape[1]
    arms = [_arm(name, *pair, new, before) for name, pair in callables.items()]
    expected = arms[1].results(arms[1].run())
    for arm in arms:
        wanted: dict[str, Any] = {"new tokens": np.asarray(new)}
        if arm.name in (MERGED, FLIX, LOOP):
            wanted["logits"] = expected["logits"]
        elif arm.name != PASSES:
            wanted["logits"] = None
        guard(arm, wanted, tolerance=tolerance(base))
    return arms, {name: pair[0] for name, pair in callables.items()}


def _routed_peers(
    make: models.Make,
    batch: MixedBatch,
    flix_model: nn.Module,
    of: Callable[..., tuple[Generate, Callable[[], Tensor | None]]],
    cut: Callable[[int | None], dict[str, Tensor]],
    forward: dict[str, Tensor],
    built: list[Any],
) -> dict[str, tuple[Generate, Callable[[], Tensor | None]]]:
    """PEFT's ways to serve rows with different adapters, with flix's values; their models join those built."""
    features = models.peft_features(make, batch, like=flix_model)
    merged = models.peft_compositions(features, batch)
    loop = models.peft_features(make, batch, like=flix_model)
    built += [features, loop]
    columns = [[models.adapter(f) for f in column] for column in zip(*batch.rows, strict=True)]
    names = [models.adapter(row) for row in batch.rows]

    def two_passes(n: int, length: int | None = None) -> Tensor:
        short = cut(length)
        return torch.stack(
            [features.generate(**short, **_settings(n), adapter_names=c) for c in columns]
        )

    def by_composition(call: Callable[[Any, dict[str, Tensor]], Tensor], like: dict) -> Tensor:
        parts = []
        for row, numbers in batch.groups.items():
            loop.base_model.set_adapter([models.adapter(f) for f in row])
            parts.append(call(loop, {k: v[numbers] for k, v in like.items()}))
        order = torch.tensor([n for numbers in batch.groups.values() for n in numbers])
        out = torch.cat(parts)
        return torch.empty_like(out).index_copy_(0, order, out)

    found: dict[str, tuple[Generate, Callable[[], Tensor | None]]] = {
        PASSES: (two_passes, lambda: None),
        MERGED: of(merged, adapter_names=names),
        LOOP: (
            lambda n, length=None: by_composition(
                lambda m, part: m.generate(**part, **_settings(n)), cut(length)
            ),
            lambda: by_composition(lambda m, part: m(**part).logits, forward),
        ),
    }
    if not any(type(m).__name__ == "Conv1D" for m in built[0].modules()):
        poly = models.peft_poly(make, batch)
        built.append(poly)
        found["PEFT Poly (another sum)"] = of(poly, task_ids=models.task_ids(batch))
    return found


def operations_a_token(generate: Generate) -> float:
    """How many torch operations each further token takes; the prompts' length does not matter to that."""
    counts = []
    for tokens in (2, 6):
        with Operations() as counted:
            generate(tokens, 4)
        counts.append(counted.count)
    return (counts[1] - counts[0]) / 4


def generation(
    make: models.Make, batch: MixedBatch, prompts: Tensor, new: int, rounds: int, limit: float
) -> tuple[Table, Figure, Figure, str]:
    """Generation of a mixed batch.

    Args:
        make: the model's maker.
        batch: its rows.
        prompts: token ids, all of one length.
        new: tokens to generate, no more and no fewer.
        rounds, limit: of the measurement.

    Returns:
        The table; flix over the base; `adapter_names` in two passes over flix; a sentence on what a token costs.
    """
    arms, generators = generation_arms(make, batch, prompts, new)
    times = interleave(arms, rounds, warmup=0, limit=limit)  # the guards have warmed them up
    ratios, flix_ratios = over(times, BASE), over(times, FLIX)
    counts = {name: operations_a_token(generate) for name, generate in generators.items()}
    rows = [
        [
            arm.name,
            figure([t * 1e3 / new for t in times[arm.name]]),
            ratios[arm.name],
            flix_ratios[arm.name],
            counts[arm.name],
        ]
        for arm in arms
    ]
    head = [
        "generation",
        "ms a token of the batch",
        "over base",
        "over flix",
        "torch operations a token",
    ]
    said = (
        f"For each new token flix runs {counts[FLIX]:,.0f} torch operations, the base model "
        f"{counts[BASE]:,.0f}."
    )
    return Table("", head, rows), ratios[FLIX], flix_ratios[PASSES], said
