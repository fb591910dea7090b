"""One layer on a GPU over the frozen layer: flix fused and gather beside PEFT's single LoRA, training and decoding.

Method: CUDA events around each run; every round runs each candidate once, in turn, and a candidate's figure is the
median over rounds of its time over the frozen layer's in the same round. Before the clock starts, flix's output
and gradients are held to another strategy's in float32. Gradients are taken with respect to the input and the pairs,
and set to None before each run, as an optimizer's zero_grad does. A run is several steps in a row, so that the launches
of one hide behind the work of the last, as in a model; decoding is measured as a CUDA graph, too, launched at once.

    python benchmarks/gpu_layer.py [--rounds 30] [--d 4096] [--features 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flix
from flix.backends.torch import FlixLinear
from flix.backends.torch._context import activated, make_routing

RANK = 8
STEPS = 10  # in a run
Step = Callable[[], Any]


def registry(count: int) -> flix.FeatureRegistry:
    half = count // 2
    return flix.FeatureRegistry(
        {"language": [f"l{i}" for i in range(half)], "task": [f"t{i}" for i in range(count - half)]}
    )


def ids_for(names: flix.FeatureRegistry, rows: int, languages: int, tasks: int) -> Tensor:
    """One language and one task a row, shuffled, of this many of each."""
    rng = np.random.default_rng(0)
    drawn = [
        {"language": f"l{rng.integers(languages)}", "task": f"t{rng.integers(tasks)}"}
        for _ in range(rows)
    ]
    return torch.from_numpy(names.encode(drawn).ids)


def flix_layer(config: flix.FlixConfig, base: nn.Linear, strategy: str) -> FlixLinear:
    d_out, d_in = base.weight.shape
    kind = {"device": "cuda", "dtype": base.weight.dtype}
    layer = FlixLinear(d_in, d_out, config=config, strategy=strategy, **kind)
    layer.weight, layer.bias = base.weight, base.bias
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for _, a, b in layer.pairs():
            a.normal_(std=d_in**-0.5, generator=generator)
            b.normal_(std=RANK**-0.5, generator=generator)
    return layer


def peft_layer(base: nn.Linear) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.layer.weight, self.layer.bias = base.weight, base.bias
            self.layer.out_features, self.layer.in_features = base.weight.shape

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    settings = LoraConfig(
        r=2 * RANK, lora_alpha=2 * RANK, target_modules=["layer"], init_lora_weights=False
    )
    return get_peft_model(Holder(), settings).to("cuda")


def training(layer: nn.Module, x: Tensor, dy: Tensor, routing: Any = None) -> Step:
    used: list[nn.Parameter] = []  # those of absent features have no gradient to be set to None

    def step() -> Any:
        x.grad = None
        for parameter in used:
            parameter.grad = None
        with activated(routing):
            y = layer(x)
        y.backward(dy)
        used[:] = used or [p for p in layer.parameters() if p.grad is not None]
        return y, x.grad

    return step


def evaluating(layer: nn.Module, x: Tensor, routing: Any = None) -> Step:
    def step() -> Any:
        with torch.no_grad(), activated(routing):
            return layer(x)

    return step


def graphed(step: Step) -> Step:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def agree(layers: list[FlixLinear], x: Tensor, dy: Tensor, routing: Any) -> float:
    """The largest relative difference of output and gradients between layers; the first is the reference."""
    found = []
    for layer in layers:
        y, dx = training(layer, x, dy, routing)()
        grads = [p.grad for _, a, b in layer.pairs() for p in (a, b) if p.grad is not None]
        found.append([y.detach(), dx, *grads])
    return max(
        ((one.float() - two.float()).norm() / one.float().norm()).item()
        for one, two in zip(*found, strict=True)
    )


def ratios(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Each candidate's time over the first one's, and the first one's milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-3, rounds):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(STEPS):
                out = step()
            end.record()
            end.synchronize()
            held = out[0] if isinstance(out, tuple) else out
            assert held.shape[-1] > 0
            if number >= 0:
                times[name].append(start.elapsed_time(end) / STEPS)
    base = next(iter(steps))
    found = {
        name: statistics.median(t / b for t, b in zip(values, times[base], strict=True))
        for name, values in times.items()
    }
    return {f"{base}, ms": statistics.median(times[base]), **found}


def measure(d: int, features: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    names = registry(features)
    config = flix.FlixConfig(registry=names, ranks=RANK)
    torch.manual_seed(0)
    results: dict[str, Any] = {}

    # The kernels against gather, where both compute in float32 (TF32 is off unless asked for).
    exact = nn.Linear(d, d, device="cuda").requires_grad_(False)
    pair = [flix_layer(config, exact, s) for s in ("gather", "fused")]
    for batch, length in ((4, 256), (4, 16), (64, 1)):
        x = torch.randn(batch, length, d, device="cuda", requires_grad=True)
        routing = make_routing(names, ids_for(names, batch, 12, 12))
        off = agree(pair, x, torch.randn_like(x), routing)
        results[f"fused against gather, float32, {batch} x {length}"] = off
        if off > 1e-4:
            sys.exit(f"fused is off by {off:.1e} at {batch} x {length}; no time is worth measuring")
    del pair, exact

    base = nn.Linear(d, d, device="cuda", dtype=dtype).requires_grad_(False)
    layers = {s: flix_layer(config, base, s) for s in ("fused", "gather")}
    peft = peft_layer(base)
    for batch, length in ((16, 512), (8, 1024), (64, 128)):
        x = torch.randn(batch, length, d, device="cuda", dtype=dtype, requires_grad=True)
        dy = torch.randn_like(x)
        routing = make_routing(names, ids_for(names, batch, 12, 12))
        steps = {"frozen": training(base, x, dy)}
        steps |= {f"flix {s}": training(layer, x, dy, routing) for s, layer in layers.items()}
        steps["PEFT, one LoRA of rank 16"] = training(peft, x, dy)
        results[f"train, {batch} x {length}"] = ratios(steps, rounds)
    for languages in (12, features // 2):
        x = torch.randn(64, 1, d, device="cuda", dtype=dtype)
        routing = make_routing(names, ids_for(names, 64, languages, min(12, languages)))
        steps = {"frozen": evaluating(base, x)}
        steps |= {f"flix {s}": evaluating(layer, x, routing) for s, layer in layers.items()}
        steps["PEFT, one LoRA of rank 16"] = evaluating(peft, x)
        what = f"decode, 64 rows of {languages} languages"
        results[f"{what}, eager"] = ratios(steps, rounds)
        graphs = {name: graphed(step) for name, step in steps.items() if name != "flix gather"}
        results[f"{what}, CUDA graphs"] = ratios(graphs, rounds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="one layer on a GPU")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--features", type=int, default=1000)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_layer.py needs a CUDA device, and torch sees none here; nothing was measured")
    dtype = getattr(torch, options.dtype)
    results = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **measure(options.d, options.features, options.rounds, dtype),
    }
    for name, value in results.items():
        if not isinstance(value, dict):
            print(f"{name}: {value}")
            continue
        print(name)
        for candidate, figure in value.items():
            print(f"  {candidate:28s} {figure:.3f}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
