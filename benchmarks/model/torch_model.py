"""Whole torch models: a training step and greedy generation of a mixed batch, flix beside PEFT.

T5-small- and GPT-2-small-sized models with random weights. PEFT is at its best: for the loop, rows are split by
composition beforehand and each part has its own backward (PEFT drops the gradients of adapters that are inactive when
backward is called, so that one backward for all would be wrong); ``adapter_names`` is for inference alone (PEFT refuses
it in training). Under equal weights flix, the loop and the concatenated adapters must agree, gradients included,
before the clock starts.

    python -m benchmarks.model.torch_model [--smoke]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    Arm,
    Bar,
    Figure,
    Plot,
    Result,
    Table,
    environment,
    interleave,
    median_ms,
    over,
)
from benchmarks.guards import check_values, guard
from benchmarks.memory import peak_bytes
from benchmarks.model import torch_models as models
from benchmarks.model.problem import LORA_RANK, MixedBatch
from benchmarks.model.torch_generation import generation, tolerance
from benchmarks.torch_gradients import adapted_layers, model_pairs, pair_gradients
from flix.backends.torch import trainable_parameters

PACKAGES = ("torch", "transformers", "peft", "numpy")
NAMES = {"t5": "T5-small", "gpt2": "GPT-2-small"}
FROZEN, FLIX = "frozen model", "**flix**"
SINGLE = f"PEFT, one LoRA of rank {LORA_RANK} for all rows"
LOOP, POLY = "PEFT, loop over the batch's compositions", "PEFT Poly (another sum)"


def _train_arm(
    name: str,
    model: nn.Module,
    forward_backward: Callable[[], Tensor],
    gradients: Callable[[], dict[str, Any]],
) -> Arm:
    """A training step: forward, backward, fused AdamW.

    The step's rate is far too small to change the model: every round computes the same.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-12, fused=True) if trained else None

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        loss = forward_backward()
        seconds = time.perf_counter() - start
        if optimizer is not None:
            optimizer.step()
        return {"loss": loss, "seconds": seconds}

    def results(out: dict[str, Any]) -> dict[str, Any]:
        return {"loss": out["loss"].numpy(), **gradients()}

    return Arm(name, run, results, lambda: model.zero_grad(set_to_none=True))


def _flix_gradients(model: nn.Module) -> dict[str, Any]:
    found = pair_gradients(model_pairs(model), model.parameters())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _peft_gradients(model: Any, batch: MixedBatch, paths: list[str]) -> dict[str, Any]:
    found = {}
    for path in paths:
        layer = model.base_model.model.get_submodule(path)
        for group, feature in batch.features:
            for which, bank in (("A", layer.lora_A), ("B", layer.lora_B)):
                gradient = bank[models.adapter((group, feature))].weight.grad
                name = f"{path}.{which}.{group}.{feature}"
                found[name] = None if gradient is None else gradient.numpy()
    return found


def _all_gradients(model: nn.Module) -> dict[str, Any]:
    """All trained parameters' gradients; None where one was not computed."""
    return {
        name: None if p.grad is None else p.grad.numpy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def training_arms(
    make: models.Make, batch: MixedBatch, inputs: dict[str, Tensor], peers: bool = True
) -> tuple[list[Arm], dict[str, nn.Module]]:
    """The candidates of a training step, each guarded; and their models.

    Args:
        make: the model's maker.
        batch: its rows.
        inputs: what the model is called with.
        peers: whether PEFT's ways to route rows take part, too.
    """
    ids = torch.from_numpy(batch.ids)

    def whole(model: nn.Module, **more: Any) -> Callable[[], Tensor]:
        def forward_backward() -> Tensor:
            loss = model(**inputs, **more).loss
            loss.backward()
            return loss.detach()

        return forward_backward

    frozen, flix_model = models.frozen_model(make), models.flix_model(make, batch)
    single = models.peft_single(make)
    built: dict[str, Any] = {FROZEN: frozen, FLIX: flix_model, SINGLE: single}
    paths = [path for path, _ in adapted_layers(flix_model)]
    adapted = [n for n, m in single.base_model.model.named_modules() if hasattr(m, "lora_A")]
    if paths != adapted:
        raise AssertionError("flix and PEFT adapt different layers")
    arms = [
        _train_arm(FROZEN, frozen, whole(frozen), dict),
        _train_arm(
            FLIX,
            flix_model,
            whole(flix_model, flix_features=ids),
            lambda: _flix_gradients(flix_model),
        ),
        _train_arm(SINGLE, single, whole(single), lambda: _all_gradients(single)),
    ]
    if peers:
        loop = built[LOOP] = models.peft_features(make, batch, like=flix_model)
        arms.append(_loop_arm(loop, batch, inputs, paths))
    if peers and not any(type(m).__name__ == "Conv1D" for m in frozen.modules()):
        poly = built[POLY] = models.peft_poly(make, batch)
        numbers = models.task_ids(batch)
        arms.append(
            _train_arm(POLY, poly, whole(poly, task_ids=numbers), lambda: _all_gradients(poly))
        )

    for model in built.values():
        model.train()
    arms[1].reset()
    expected = arms[1].results(arms[1].run())
    wanted = {f"{path}.A.{group}.{name}" for path in paths for group, name in batch.features}
    if not wanted <= set(expected) or len(expected) != 2 * len(wanted) + 1:
        raise AssertionError("flix's gradients are not those of the batch's features")
    check_values(FLIX, expected, expected)
    for arm in arms:
        if arm.name == FROZEN:
            guard(arm, ["loss"])
        elif arm.name == LOOP:
            guard(arm, expected, tolerance=tolerance(frozen))
        elif arm.name != FLIX:
            guard(arm, ["loss", *_all_gradients(built[arm.name])])
    return arms, built


def _loop_arm(loop: Any, batch: MixedBatch, inputs: dict[str, Tensor], paths: list[str]) -> Arm:
    """PEFT's loop over the batch's compositions; the rows are split before the clock starts."""
    parts = [
        ([models.adapter(f) for f in row], {k: v[numbers] for k, v in inputs.items()}, len(numbers))
        for row, numbers in batch.groups.items()
    ]
    rows = sum(count for *_, count in parts)

    def forward_backward() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for names, part, count in parts:
            loop.base_model.set_adapter(names)
            loss = loop(**part).loss * (count / rows)
            loss.backward()
            total += loss.detach()
        return total

    # PEFT's set_adapter makes the active adapters trainable and the others not: the optimizer gets all of them.
    for name, parameter in loop.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return _train_arm(LOOP, loop, forward_backward, lambda: _peft_gradients(loop, batch, paths))


def training(
    make: models.Make, batch: MixedBatch, inputs: dict[str, Tensor], rounds: int, limit: float
) -> tuple[Table, Figure, Figure]:
    """The training step: a table, flix over PEFT's single LoRA, and PEFT's loop over flix."""
    arms, built = training_arms(make, batch, inputs)
    parts: dict[str, list[float]] = {arm.name: [] for arm in arms}

    def seen(name: str, out: dict[str, Any]) -> None:
        parts[name].append(out["seconds"])

    times = interleave(
        arms, rounds, warmup=0, limit=limit, seen=seen
    )  # the guards were the warm-up
    step, alone = over(times, FROZEN), over(parts, FROZEN)
    single = over(times, SINGLE)
    peaks = {arm.name: peak_bytes(arm.run, arm.reset) / 2**20 for arm in arms}
    optimizer = {
        name: [t - p for t, p in zip(times[name], parts[name], strict=True)] for name in times
    }
    rows: list[list[Any]] = []
    for arm in arms:
        name = arm.name
        trained = (
            list(trainable_parameters(built[name]))
            if name == FLIX
            else [p for p in built[name].parameters() if p.requires_grad]
        )
        rows.append(
            [
                name,
                statistics.median(times[name]),
                step[name],
                alone[name],
                single[name],
                median_ms(optimizer[name]) if trained else None,
                peaks[name],
            ]
        )
    head = [
        "training step",
        "s",
        "over frozen",
        "forward and backward alone",
        "over PEFT's one LoRA",
    ]
    table = Table("", [*head, "AdamW, ms", "peak MiB"], rows)
    return table, single[FLIX], over(times, FLIX)[LOOP]


def problem(
    which: str, smoke: bool = False, length: int = 64
) -> tuple[models.Make, MixedBatch, dict[str, Tensor]]:
    """A model's maker, its batch, and the inputs of a step.

    Args:
        which: "t5" or "gpt2".
        smoke: tiny, and in float64.
        length: positions, in source and target.
    """
    build = {"t5": models.t5_small, "gpt2": models.gpt2_small}[which]

    def make() -> nn.Module:
        return build(smoke).double() if smoke else build(smoke)

    batch = MixedBatch(6, 4) if smoke else MixedBatch()
    generator = torch.Generator().manual_seed(2)
    shape, vocabulary = (len(batch.rows), 8 if smoke else length), make().config.vocab_size
    source, target = (torch.randint(2, vocabulary, shape, generator=generator) for _ in range(2))
    return make, batch, {"input_ids": source, "labels": target if which == "t5" else source}


def _suite(which: str, smoke: bool) -> Result:
    torch.set_num_threads(1)
    make, batch, inputs = problem(which, smoke)
    name = NAMES[which]
    length, new = inputs["input_ids"].shape[1], 3 if smoke else 32 if which == "t5" else 16
    result = Result(
        f"model-{which}", f"A whole model: {name}-sized, PyTorch", environment=environment(PACKAGES)
    )
    table, single, looped = training(
        make, batch, inputs, 1 if smoke else 8, 5.0 if smoke else 100.0
    )
    table.title = f"A training step, {name}-sized"
    table.note = (
        "The step is forward, backward and `torch.optim.AdamW(fused=True)` for all; the frozen model's has no optimizer, and its "
        "backward runs to the embeddings. Peak: what torch's allocator held at once, above model and optimizer."
    )
    tokens, slower, speedup, operations = generation(
        make, batch, inputs["input_ids"], new, 1 if smoke else 6, 5.0 if smoke else 80.0
    )
    tokens.title = f"Greedy generation of {new} tokens, {name}-sized"
    result.tables += [table, tokens]
    result.method = (
        f"Random weights, all linear layers but the head adapted; {batch.describe()}; {length} positions"
        f"{' in source and target' if which == 't5' else ''}. {operations}"
    )
    result.bars += [
        Bar(f"{name} training step, over PEFT's one LoRA", single, 0.95 if which == "t5" else 1.0),
        Bar(
            f"{name} training step, PEFT's loop over flix",
            looped,
            2.0,
            at_most=False,
        ),
        Bar(f"{name} generation, `adapter_names` over flix", speedup, 3.0, at_most=False),
    ]
    if which == "t5":
        result.bars.append(Bar(f"{name} generation, over the base model", slower, 1.12))
    shown = [row for row in table.rows if row[0] != FROZEN]
    result.plots.append(
        Plot(
            f"model-{which}.png",
            f"Training step of a mixed batch, {name}-sized",
            "",
            "time over the frozen model",
            [row[0].strip("*") for row in shown],
            {"training step": [row[2].median for row in shown]},
        )
    )
    return result


def t5(smoke: bool = False) -> Result:
    """The T5-small-sized model's part of the benchmark."""
    return _suite("t5", smoke)


def gpt2(smoke: bool = False) -> Result:
    """The GPT-2-small-sized model's part of the benchmark."""
    return _suite("gpt2", smoke)


if __name__ == "__main__":
    from benchmarks.report import section

    for part in (t5, gpt2):
        print(section(part("--smoke" in sys.argv).to_dict()), "\n")
