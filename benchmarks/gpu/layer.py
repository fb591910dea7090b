"""One layer in bfloat16, d = 4096, 8,192 tokens, forward and backward: every strategy beside the frozen layer, LoRAs.

A figure is the device's own time of a step that begins with a cold cache; the time of several steps in a row, with the
host's part in it, stands beside. What a strategy adds is also said in *passes*: its time above the frozen layer's, over
the time that reading or writing all activations of the layer once takes at the card's own speed of copying.
LoRAFusion (arXiv 2510.00206) finds that this is where the time of LoRA goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import flix
from benchmarks.common import Arm, Table, figure, median_ms, over
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.problem import (
    FROZEN,
    LORA,
    PEFT,
    Lora,
    dense,
    distance,
    draw_ids,
    flix_layer,
    layer_arm,
    pairs_of,
    peft_layer,
)
from benchmarks.gpu.record import Record
from benchmarks.layer.problem import make_registry
from benchmarks.torch_gradients import pair_gradients

NOTE = (
    "Device time of one step with a cold cache; host included: ten steps in a row. Passes: the time above the frozen layer's "
    "in units of reading or writing the layer's activations once. By design the fused kernels make 7 (x read, y written and "
    "read again; dy read, dx written and read again, x read), gather 8 and the copies of slots, PEFT in the base's dtype 16."
)


def peers(record: Record, base: nn.Linear, x: Tensor, dy: Tensor | None) -> list[Arm]:
    """The frozen layer, and LoRAs of one composition for all rows."""
    arms = [layer_arm(FROZEN, base, x, dy), layer_arm(LORA, Lora(base), x, dy)]
    for half in (True, False):
        name = f"{PEFT}{', bfloat16' if half else ', float32 (its default)'}"
        made = record.attempt(name, lambda half=half: peft_layer(base, half))
        if made is not None:
            arms.append(layer_arm(name, made, x, dy))
    return arms


def guard(
    arm: Arm, layer: Any, config: flix.FlixConfig, ids: Tensor, x: Tensor, dy: Tensor
) -> float:
    """How far a flix arm is from the definition.

    Raises:
        AssertionError: it is too far.
    """
    arm.reset()
    with arm.around():
        results = arm.results(arm.run())
    found = {"y": results["y"], "x": results["dx"]}
    pairs = pairs_of(layer, config)
    expected = dense(x, dy, layer.weight, layer.bias, pairs, config, ids)
    for name, value in pair_gradients(pairs, layer.parameters()).items():
        assert (value is None) == (name not in expected), f"gradient of {name}"
        if value is not None:
            found[name] = torch.from_numpy(value)
    far = {name: distance(value, expected[name]) for name, value in found.items()}
    worst = max(far, key=lambda name: far[name])
    assert far[worst] < 3e-2, f"{worst} is off by {far[worst]:.1e}"
    arm.reset()
    return far[worst]


def compare(
    record: Record,
    clock: Clock,
    title: str,
    shape: tuple[int, int, int],
    features: int,
    ids: Tensor,
    strategies: tuple[str, ...],
    rounds: int,
    speed: float,
) -> None:
    """One table: all candidates on one batch."""
    count, length, d = shape
    dtype = torch.bfloat16
    torch.manual_seed(0)
    base = nn.Linear(d, d, device=clock.device, dtype=dtype).requires_grad_(False)
    x = torch.randn(count, length, d, device=clock.device, dtype=dtype, requires_grad=True)
    dy = torch.randn(count, length, d, device=clock.device, dtype=dtype)
    config = flix.FlixConfig(registry=make_registry(features), ranks=8)
    arms = peers(record, base, x, dy)
    for strategy in strategies:
        name = f"flix, {strategy}"

        def make(strategy: str = strategy, name: str = name) -> Arm:
            layer = flix_layer(base, config, strategy)
            arm = layer_arm(name, layer, x, dy, (config.registry, ids))
            record.put(f"{title}: {name}, off by", guard(arm, layer, config, ids, x, dy))
            return arm

        arm = record.attempt(f"{title}: {name}, guard", make)
        if arm is not None:
            arms.append(arm)

    def measure() -> None:
        times = clock.times(arms, rounds)
        frozen, lora = over(times, FROZEN), over(times, LORA)
        base_ms = figure(times[FROZEN]).median
        one_pass = count * length * d * x.element_size() / speed * 1e3
        host = clock.times(arms, 3 if clock.cuda else 1, clock.warm)
        rows: list[list[Any]] = []
        for arm in arms:
            ms = figure(times[arm.name])
            passes = (ms.median - base_ms) / one_pass
            warm = figure(host[arm.name]).median
            peak = clock.peak(arm)
            rows.append([arm.name, ms, frozen[arm.name], lora[arm.name], passes, warm, peak])
        head = ["", "ms", "over frozen", "over one LoRA", "passes", "host included, ms", "peak MiB"]
        record.table(Table(title, head, rows, NOTE))
        record.put(title, {row[0]: row[1:] for row in rows})

    record.attempt(title, measure, needs=8.0)
    for parameter in (x, *base.parameters()):
        parameter.grad = None


def run(record: Record) -> None:
    """The section."""
    clock = Clock(record.dry)
    speed = clock.bandwidth()
    record.put("bytes copied a second, read and written", speed)
    shape, rounds = ((2, 4, 16), 1) if record.dry else ((16, 512, 4096), 20)
    count, length, d = shape
    many = 40 if record.dry else 1000
    where = f"bfloat16, d = {d}, {count} x {length} positions"
    mixed = ("fused", "gather", "masked", "auto")
    compare(
        record, clock, f"25 features, mixed rows: {where}", shape, 25,
        draw_ids(25, count, 12, 12), mixed, rounds, speed,
    )  # fmt: skip
    compare(
        record, clock, f"{many:,} features, rows of all of them: {where}", shape, many,
        draw_ids(many, count, many // 2, many // 2), mixed, rounds, speed,
    )  # fmt: skip
    alike = draw_ids(25, 1, 12, 12).repeat(count, 1)
    compare(
        record, clock, f"25 features, all rows alike: {where}", shape, 25,
        alike, ("single", "fused", "gather", "masked"), rounds, speed,
    )  # fmt: skip
    record.attempt("from which length on", lambda: lengths(record, clock, (rounds + 1) // 2), 10.0)


def lengths(record: Record, clock: Clock, rounds: int) -> None:
    """Fused, gather and masked over positions a row and unions: what the table of strategies needs of a device."""
    d, tokens = (16, 4) if record.dry else (4096, 8192)
    rows: list[list[Any]] = []
    for length in (1, 2) if record.dry else (1, 4, 16, 64, 256):
        count = min(tokens // length, 512)
        for features, languages, tasks in ((3, 2, 1), (25, 12, 12), (200, 100, 100)):
            if record.left() < 8.0:
                record.skip(f"{length} positions, {features} features", "no time was left")
                continue
            ids = draw_ids(features, count, languages, tasks)
            torch.manual_seed(0)
            base = nn.Linear(d, d, device=clock.device, dtype=torch.bfloat16).requires_grad_(False)
            kind: dict[str, Any] = {"device": clock.device, "dtype": torch.bfloat16}
            x = torch.randn(count, length, d, **kind).requires_grad_()
            dy = torch.randn(count, length, d, **kind)
            config = flix.FlixConfig(registry=make_registry(features), ranks=8)
            arms = [layer_arm(FROZEN, base, x, dy)]
            for strategy in ("fused", "gather", "masked"):
                layer = flix_layer(base, config, strategy)
                arms.append(layer_arm(strategy, layer, x, dy, (config.registry, ids)))
            times = clock.times(arms, rounds)
            ratios = over(times, FROZEN)
            union = 8 * len(ids.unique())
            rows.append(
                [
                    f"{count} x {length}",
                    union,
                    median_ms([t / 1e3 for t in times[FROZEN]]),
                    *(ratios[s] for s in ("fused", "gather", "masked")),
                ]
            )
    head = ["rows x positions", "union's slots", "frozen, ms", "fused", "gather", "masked"]
    title = f"Which strategy: forward and backward over the frozen layer, bfloat16, d = {d}"
    record.table(Table(title, head, rows, "Device time with a cold cache."))
    record.put("strategies", rows)
