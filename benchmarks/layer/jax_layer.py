"""The cost of one routed linear layer in JAX, forward and backward, as a ratio to the frozen layer.

Method: float32, one thread, compiled; 25 features of rank 8, two active a row, rows shuffled; the base is frozen, so
the frozen layer's backward is the gradient of x alone and a method's that of x and of its pairs. Every function returns
its output and its gradients under a given cotangent, so that nothing can be pruned, and they are held to the definition
before the clock starts. Rounds are interleaved, and the figure is the median of the rounds' ratios.

    python -m benchmarks.layer.jax_layer                 # both sizes, then 25 to 2000 registered features
    python -m benchmarks.layer.jax_layer --json out.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import jax_settings  # noqa: F401 - before JAX

# isort: split

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common import (
    Arm,
    Bar,
    Figure,
    Result,
    environment,
    interleave,
    median_ms,
    over,
    ratio_table,
)
from benchmarks.guards import guard
from benchmarks.layer.problem import ACTIVE, RANK, SHAPES, Problem, make_problem
from flix.backends.jax import LayerBank, gather, init, linear, linear_rows, touched

BARS = {768: 1.20, 2048: 1.06}
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
LORA = "nnx.LoRA, rank 16"
Setup = dict[str, Any]
Method = Callable[[Setup], Any]


def setup(problem: Problem) -> Setup:
    """A problem's arrays in JAX: x, the kernel, the bank, ids, the cotangent, and one LoRA."""
    d, rank, registry = problem.d, problem.rank, problem.registry
    tables = np.zeros((2, len(registry) * rank, d), np.float32)
    for feature, pair in problem.pairs.items():
        start = registry.id(*feature) * rank
        tables[0, start : start + rank] = pair.a
        tables[1, start : start + rank] = pair.b.T
    bank = init(problem.config, {"layer": (d, d)})
    bank = {"layer": LayerBank(*map(jnp.asarray, tables), bank["layer"].spec)}
    lora = nnx.LoRA(d, ACTIVE * RANK, d, rngs=nnx.Rngs(0), b_initializer=nnx.initializers.normal())
    structure, values = nnx.split(lora)
    return {
        "x": jnp.asarray(problem.x),
        "kernel": jnp.asarray(problem.weight.T),
        "bias": jnp.asarray(problem.bias),
        "g": jnp.asarray(problem.dy),
        "bank": bank,
        "ids": jnp.asarray(problem.ids),
        "structure": structure,
        "lora": values,
    }


def frozen(s: Setup) -> Any:
    y, back = jax.vjp(lambda x: x @ s["kernel"] + s["bias"], s["x"])
    return y, back(s["g"])


def one_lora(s: Setup) -> Any:
    """``nnx.LoRA`` of rank 16: one for all rows. It does not route, and is here for its arithmetic."""

    def run(x: Any, values: Any) -> Any:
        return x @ s["kernel"] + s["bias"] + nnx.merge(s["structure"], values)(x)

    y, back = jax.vjp(run, s["x"], s["lora"])
    return y, back(s["g"])


def by_rows(s: Setup, strategy: str = "gather") -> Any:
    """flix as it trains: gradients of the batch's rows."""
    present = touched(s["ids"], len(s["bank"]["layer"].spec.registry))
    rows = gather(s["bank"], present)

    def run(x: Any, rows: Any) -> Any:
        return linear_rows(
            x, s["kernel"], rows["layer"], s["ids"], present, bias=s["bias"], strategy=strategy
        )

    y, back = jax.vjp(run, s["x"], rows)
    return y, back(s["g"])


def by_bank(s: Setup) -> Any:
    """The plain path: gradients as large as the bank."""
    y, back = jax.vjp(
        lambda x, bank: linear(
            x, s["kernel"], bank["layer"], s["ids"], bias=s["bias"], strategy="gather"
        ),
        s["x"],
        s["bank"],
    )
    return y, back(s["g"])


METHODS: dict[str, Method] = {
    "frozen": frozen,
    LORA: one_lora,
    "gather": by_rows,
    "masked": lambda s: by_rows(s, "masked"),
    "auto": lambda s: by_rows(s, "auto"),
    "gather, dense gradient": by_bank,
}


def _results(problem: Problem, out: Any) -> dict[str, Any]:
    """y, dx and each feature's gradients of what a method returned."""
    y, (dx, *rest) = out
    found: dict[str, Any] = {"y": np.asarray(y), "dx": np.asarray(dx)}
    if not rest:
        return found
    if not isinstance(rest[0], Mapping) or "layer" not in rest[0]:
        leaves = jax.tree.leaves(rest[0])
        return found | {"dA": np.asarray(leaves[0]), "dB": np.asarray(leaves[1])}
    rank, features = problem.rank, problem.registry.features
    a, b = np.asarray(rest[0]["layer"].A), np.asarray(rest[0]["layer"].B)
    used = sorted(problem.registry.id(*feature) for feature in problem.pairs)
    if isinstance(rest[0]["layer"], LayerBank):
        used = list(range(len(features)))  # gradients of the whole table
    for place, i in enumerate(used):
        rows = slice(place * rank, (place + 1) * rank)
        found[f"dA {features[i]}"], found[f"dB {features[i]}"] = a[rows], b[rows].T
    return found


def guarded_arms(problem: Problem, methods: dict[str, Method]) -> list[Arm]:
    """The methods, compiled, once each has been held to the definition."""
    arrays = setup(problem)
    structure = arrays.pop("structure")
    expected, plain = problem.expected(), problem.plain()
    arms = []
    for name, method in methods.items():
        compiled = jax.jit(lambda s, method=method: method({**s, "structure": structure}))
        arm = Arm(
            name,
            lambda compiled=compiled: jax.block_until_ready(compiled(arrays)),
            lambda out: _results(problem, out),
        )
        absent = [f"dA {f}" for f in problem.registry.features if f not in problem.pairs]
        if name == "frozen":
            guard(arm, plain)
        elif "LoRA" in name:
            guard(arm, ("y", "dx", "dA", "dB"))
        else:
            guard(arm, expected, absent=() if "dense" in name else absent)
        arms.append(arm)
    return arms


def measure(
    problem: Problem, methods: dict[str, Method], rounds: int
) -> tuple[float, dict[str, Figure]]:
    """Median seconds of the first method, and each other's ratio to it within the rounds."""
    times = interleave(guarded_arms(problem, methods), rounds)
    base = next(iter(methods))
    return median_ms(times[base]) / 1e3, over(times, base)


def start() -> str:
    """Where the layers run; ``jax_settings`` leaves them one thread."""
    return jax.default_backend()


def over_masked(strategy: str, problem: Problem, rounds: int) -> float:
    """Time of a strategy over time of masked; above 1, masked is faster."""
    pair = {"masked": METHODS["masked"], strategy: lambda s: by_rows(s, strategy)}
    return measure(problem, pair, rounds)[1][strategy].median


def growth_of(counts: tuple[int, ...], shape: tuple[int, int, int], rounds: int) -> dict[int, Any]:
    """gather, and gather with the dense gradient, over growing registries."""
    few = {name: METHODS[name] for name in ("frozen", "gather", "gather, dense gradient")}
    return {n: measure(make_problem(*shape, n), few, rounds)[1] for n in counts}


def suite(smoke: bool = False) -> Result:
    """The JAX layer's part of the benchmark."""
    shapes = ((64, 4, 16),) if smoke else SHAPES
    rounds, counts = (3, (25, 100)) if smoke else (25, (25, 100, 500, 2000))
    result = Result("layer-jax", "One layer: JAX", environment=environment(PACKAGES))
    result.method = (
        "As for PyTorch, compiled by `jit` and pinned to one core. `nnx.LoRA` is one LoRA for all rows; it cannot route them. "
        "The gradient is taken of the rows that the batch uses (`gather`, `touched`); the dense gradient is as large as the bank."
    )
    columns: dict[str, dict[str, Any]] = {}
    for d, batch, length in shapes:
        seconds, ratios = measure(make_problem(d, batch, length), METHODS, rounds)
        columns[f"d = {d}, {batch} x {length} positions"] = {"frozen, ms": seconds * 1e3, **ratios}
        if d in BARS:
            result.bars.append(Bar(f"JAX layer, d = {d}, over frozen", ratios["auto"], BARS[d]))
    result.tables.append(ratio_table("Forward and backward over the frozen layer", columns))
    growth = {f"{n:,}": found for n, found in growth_of(counts, shapes[0], rounds).items()}
    result.tables.append(ratio_table(f"Registered features, d = {shapes[0][0]}", growth))
    return result


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for d, batch, length in SHAPES:
        base, ratios = measure(make_problem(d, batch, length), METHODS, options.rounds)
        print(f"d={d}, B={batch}, S={length}: frozen {base * 1e3:.1f} ms")
        for name, ratio in ratios.items():
            note = f"  (bar {BARS[d]:.2f})" if name == "auto" else ""
            print(f"  {name:<24}{ratio.median:6.2f} ± {ratio.spread:.2f}{note}")
        medians = {name: ratio.median for name, ratio in ratios.items()}
        results[str(d)] = {"frozen_ms": base * 1e3, "ratios": medians, "bar": BARS[d]}
    print("registered features, d=768: gather; with the dense gradient")
    growth = {}
    for features, ratios in growth_of((25, 100, 500, 2000), SHAPES[0], options.rounds).items():
        growth[features] = {name: ratio.median for name, ratio in ratios.items()}
        line = growth[features]
        print(f"  {features:5d}{line['gather']:8.2f}{line['gather, dense gradient']:8.2f}")
    results["growth"] = growth
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
