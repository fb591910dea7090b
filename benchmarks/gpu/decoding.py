"""One token for each of 64 rows through one layer: eager, and as a CUDA graph, as servers decode."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

import flix
from benchmarks.common import Arm, Table, figure, over
from benchmarks.gpu.clock import Clock, graphed
from benchmarks.gpu.layer import peers
from benchmarks.gpu.problem import FROZEN, LORA, draw_ids, flix_layer, layer_arm
from benchmarks.gpu.record import Record
from benchmarks.layer.problem import make_registry


def run(record: Record) -> None:
    """The section."""
    clock = Clock(record.dry)
    rows, d, rounds = (3, 16, 1) if record.dry else (64, 4096, 30)
    features = 40 if record.dry else 1000
    config = flix.FlixConfig(registry=make_registry(features), ranks=8)
    kind: dict[str, Any] = {"device": clock.device, "dtype": torch.bfloat16}
    torch.manual_seed(0)
    base = nn.Linear(d, d, **kind).requires_grad_(False)
    x = torch.randn(rows, 1, d, **kind)
    layers = {}
    for strategy in ("fused", "gather", "masked", "auto"):
        name = f"flix, {strategy}"
        made = record.attempt(name, lambda s=strategy: flix_layer(base, config, s))
        if made is not None:
            layers[name] = made
    others = peers(record, base, x, None)
    for languages in (2, 12, features // 2):
        ids = draw_ids(features, rows, languages, min(12, features // 2))
        routing = (config.registry, ids)
        arms = others + [layer_arm(n, layer, x, None, routing) for n, layer in layers.items()]
        union = 8 * len(ids.unique())
        title = f"Decoding {rows} rows, d = {d}, {features:,} features, {union} slots in use"
        record.attempt(
            title, lambda arms=arms, title=title: table(record, clock, title, arms, rounds)
        )


def table(record: Record, clock: Clock, title: str, arms: list[Arm], rounds: int) -> None:
    """Eager, in a CUDA graph, and the host's part."""
    outputs = {}
    for arm in arms:
        if arm.name.startswith("flix"):
            with arm.around():
                outputs[arm.name] = arm.run().float()
    for name, y in outputs.items():
        first = next(iter(outputs.values()))
        far = float((y - first).norm() / first.norm())
        assert far < 3e-2, f"{name} is off by {far:.1e} from {next(iter(outputs))}"
    eager = clock.times(arms, rounds)
    host = clock.times(arms, 3 if clock.cuda else 1, clock.warm)
    columns = [over(eager, FROZEN), over(eager, LORA)]
    graphs: dict[str, Any] = {}
    if clock.cuda:
        graphs = (
            record.attempt(
                f"{title}: CUDA graphs", lambda: in_graphs(record, clock, title, arms, rounds)
            )
            or {}
        )
    found = []
    for arm in arms:
        name = arm.name
        warm = figure(host[name]).median
        cells = [figure(eager[name]), *(column[name] for column in columns)]
        found.append([name, *cells, graphs.get(name), warm])
    head = ["", "ms", "over frozen", "over one LoRA", "as a CUDA graph, ms", "host included, ms"]
    note = "Device time of one step with a cold cache; host included: ten steps in a row."
    record.table(Table(title, head, found, note))
    record.put(title, {row[0]: row[1:] for row in found})


def in_graphs(
    record: Record, clock: Clock, title: str, arms: list[Arm], rounds: int
) -> dict[str, Any]:
    """Milliseconds of every arm that can be captured as a CUDA graph."""
    captured = []
    with ExitStack() as kept:
        for arm in arms:
            name = f"{title}: graph of {arm.name}"
            made = record.attempt(name, lambda arm=arm: graphed(arm, kept))
            if made is not None:
                captured.append(made)
        return {name: figure(ms) for name, ms in clock.times(captured, rounds).items()}
