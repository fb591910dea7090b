"""One layer, forward and backward, over the frozen layer: flix beside PEFT.

Method: float32, one thread unless told; every round runs each candidate once, in turn, and a candidate's figure is the
median over rounds of its time over the frozen layer's in the same round, so that drift of the machine cancels.
The output feeds a backward with a fixed gradient of full size, so nothing can be pruned; gradients are taken with
respect to the input and the adapter's parameters, and the base is frozen. Gradients are set to None before each run, as
an optimizer's zero_grad does.

    python benchmarks/layer.py [--rounds 15] [--json FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import flix
from flix.backends.torch import FlixLinear, route

SHAPES = ((768, 16, 64), (2048, 8, 128))  # (d, batch, length)
FEATURES = 25
RANK = 8
ACTIVE = 2

Run = Callable[[torch.Tensor, torch.Tensor], None]


def frozen(d: int) -> tuple[nn.Module, Run]:
    layer = nn.Linear(d, d).requires_grad_(False)
    return layer, lambda x, dy: layer(x).backward(dy)


def flix_layer(d: int, count: int, batch: int, strategy: str) -> tuple[nn.Module, Run]:
    """``count`` features of rank 8 in two groups; every row takes one of each, in shuffled order."""
    half = count // 2
    registry = flix.FeatureRegistry(
        {"language": [f"l{i}" for i in range(half)], "task": [f"t{i}" for i in range(count - half)]}
    )
    config = flix.FlixConfig(registry=registry, ranks=RANK)
    layer = FlixLinear(d, d, config=config, strategy=strategy)
    for bank in (layer.flix_A, layer.flix_B):
        for parameter in bank.parameters():
            nn.init.normal_(parameter, std=0.02)
    rng = np.random.default_rng(0)
    rows = [
        {"language": f"l{rng.integers(min(half, 12))}", "task": f"t{rng.integers(min(half, 12))}"}
        for _ in range(batch)
    ]
    routing = registry.encode(rows)
    assert routing.width == ACTIVE

    def run(x: torch.Tensor, dy: torch.Tensor) -> None:
        # The plan of a batch is made once a step and shared by all layers; here it is paid for by one.
        with route(registry, routing):
            y = layer(x)
        y.backward(dy)

    return layer, run


def peft_lora(d: int, rank: int) -> tuple[nn.Module, Run]:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        nn.Sequential(nn.Linear(d, d)), LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    )
    return model, lambda x, dy: model(x).backward(dy)


def timed(layer: nn.Module, run: Run, x: torch.Tensor, dy: torch.Tensor) -> float:
    layer.zero_grad(set_to_none=True)
    x.grad = None
    start = time.perf_counter()
    run(x, dy)
    elapsed = time.perf_counter() - start
    # Guards: the gradient must have reached the input and, where there are any, the trained parameters.
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert not trained or any(p.grad is not None and bool(p.grad.any()) for p in trained)
    return elapsed


def compare(d: int, batch: int, length: int, rounds: int, candidates: dict) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(batch, length, d, requires_grad=True)
    dy = torch.randn(batch, length, d)
    built = {name: make() for name, make in candidates.items()}
    for layer, run in built.values():
        for _ in range(2):
            timed(layer, run, x, dy)
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(rounds):
        for name, (layer, run) in built.items():
            times[name].append(timed(layer, run, x, dy))
    base = times["frozen layer"]
    ratios = {
        name: statistics.median(t / b for t, b in zip(values, base, strict=True))
        for name, values in times.items()
    }
    ratios["frozen layer, ms"] = statistics.median(base) * 1e3
    return ratios


def measure(d: int, batch: int, length: int, rounds: int, smoke: bool) -> dict[str, float]:
    candidates: dict[str, Callable[[], tuple[nn.Module, Run]]] = {
        "frozen layer": lambda: frozen(d),
        "PEFT LoRA r=16": lambda: peft_lora(d, ACTIVE * RANK),
        "flix gather, 25 features": lambda: flix_layer(d, FEATURES, batch, "gather"),
        "flix masked, 25 features": lambda: flix_layer(d, FEATURES, batch, "masked"),
        "flix auto, 25 features": lambda: flix_layer(d, FEATURES, batch, "auto"),
    }
    for count in (100,) if smoke else (100, 500, 2000):
        candidates[f"flix auto, {count} features"] = lambda n=count: flix_layer(d, n, batch, "auto")
    return compare(d, batch, length, rounds, candidates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small and quick: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = ((256, 8, 32),) if options.smoke else SHAPES
    rounds = 5 if options.smoke else options.rounds
    results = {}
    for d, batch, length in shapes:
        ratios = measure(d, batch, length, rounds, options.smoke)
        results[f"d={d}, B={batch}, S={length}"] = ratios
        print(f"d={d}, B={batch}, S={length}: frozen {ratios.pop('frozen layer, ms'):.1f} ms")
        for name, ratio in ratios.items():
            print(f"  {name:<28}{ratio:6.3f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
