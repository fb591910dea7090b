"""The cost of one routed linear layer in JAX, forward and backward, as a ratio to the frozen layer.

Method: float32, one thread, compiled; 25 features of rank 8, two active a row, rows shuffled; the base is frozen, so
the frozen layer's backward is the gradient of x alone and a method's that of x and of its pairs. Every function returns
its output and its gradients under a given cotangent, so that nothing can be pruned. Rounds are interleaved, and the
figure is the median of the rounds' ratios.

    python benchmarks/jax_layer.py                 # both sizes, then 25 to 2000 registered features
    python benchmarks/jax_layer.py --crossover     # gather against masked over tokens a row and union
    python benchmarks/jax_layer.py --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np

import flix
from flix.backends.jax import gather, init, linear, linear_rows, touched

RANK, ACTIVE = 8, 2
SIZES = {768: (16, 64, 1.30), 2048: (8, 128, 1.10)}
Setup = dict[str, Any]


def setup(d: int, rows: int, length: int, features: int, seed: int = 0) -> Setup:
    """Arrays of one problem: x ``[rows, length, d]``, kernel, bank, ids, cotangent."""
    rng = np.random.default_rng(seed)
    registry = flix.FeatureRegistry({"feature": [f"f{i}" for i in range(features)]})
    bank = init(flix.FlixConfig(registry=registry, ranks=RANK), {"layer": (d, d)})
    table = rng.normal(size=(features * RANK, d)).astype(np.float32) * 0.02
    bank = jax.tree.map(lambda _: jnp.asarray(table), bank)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    ids = np.stack([rng.choice(features, ACTIVE, replace=False) for _ in range(rows)])
    return {
        "x": normal(rows, length, d),
        "kernel": normal(d, d) / d**0.5,
        "g": normal(rows, length, d),
        "bank": bank,
        "ids": jnp.asarray(ids, jnp.int32),
        "lora": (normal(d, ACTIVE * RANK) * 0.02, normal(ACTIVE * RANK, d) * 0.02),
    }


def frozen(s: Setup) -> Any:
    y, back = jax.vjp(lambda x: x @ s["kernel"], s["x"])
    return y, back(s["g"])


def one_lora(s: Setup) -> Any:
    """One LoRA of rank 16 for all rows: what the same arithmetic costs without routing."""
    y, back = jax.vjp(lambda x, ab: x @ s["kernel"] + (x @ ab[0]) @ ab[1], s["x"], s["lora"])
    return y, back(s["g"])


def by_rows(s: Setup, strategy: str = "gather") -> Any:
    """flix as it trains: gradients of the batch's rows."""
    present = touched(s["ids"], len(s["bank"]["layer"].spec.registry))
    rows = gather(s["bank"], present)

    def run(x: Any, rows: Any) -> Any:
        return linear_rows(x, s["kernel"], rows["layer"], s["ids"], present, strategy=strategy)

    y, back = jax.vjp(run, s["x"], rows)
    return y, back(s["g"])


def by_bank(s: Setup) -> Any:
    """The plain path: gradients as large as the bank."""
    y, back = jax.vjp(
        lambda x, bank: linear(x, s["kernel"], bank["layer"], s["ids"], strategy="gather"),
        s["x"],
        s["bank"],
    )
    return y, back(s["g"])


METHODS: dict[str, Callable[[Setup], Any]] = {
    "frozen": frozen,
    "one LoRA, rank 16": one_lora,
    "gather": by_rows,
    "masked": lambda s: by_rows(s, "masked"),
    "gather, dense gradient": by_bank,
}


def measure(problem: Setup, methods: dict[str, Callable[[Setup], Any]], rounds: int) -> Any:
    """Median seconds of the first method, and each other's median ratio to it within the rounds."""
    compiled = {name: jax.jit(method) for name, method in methods.items()}
    for method in compiled.values():
        jax.block_until_ready(method(problem))
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(method(problem))
            seconds[name].append(time.perf_counter() - start)
    table = np.array(list(seconds.values()))
    ratios = np.median(table / table[0], axis=1)
    return float(np.median(table[0])), dict(zip(methods, map(float, ratios), strict=True))


def crossover(rounds: int) -> None:
    """Time of gather over time of masked, for tokens a row and union rows: above 1, masked is faster."""
    d, pair = 768, {"masked": METHODS["masked"], "gather": METHODS["gather"]}
    print("gather / masked at d=768; rows of the union down, tokens a row across")
    tokens = (1, 4, 8, 16)
    print("union".rjust(8), *(f"S={s}".rjust(8) for s in tokens))
    for features in (4, 25, 100):
        line = []
        for length in tokens:
            problem = setup(d, max(512 // length, 4), length, features)
            line.append(measure(problem, pair, rounds)[1]["gather"])
        print(f"{features * RANK:8d}", *(f"{ratio:8.2f}" for ratio in line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.crossover:
        crossover(options.rounds)
        return
    results: dict[str, Any] = {}
    for d, (rows, length, bar) in SIZES.items():
        base, ratios = measure(setup(d, rows, length, 25), METHODS, options.rounds)
        print(f"d={d}, B={rows}, S={length}: frozen {base * 1e3:.1f} ms")
        for name, ratio in ratios.items():
            note = f"  (bar {bar:.2f})" if name == "gather" else ""
            print(f"  {name:<24}{ratio:6.2f}{note}")
        results[str(d)] = {"frozen_ms": base * 1e3, "ratios": ratios, "bar": bar}
    print("registered features, d=768: gather; with the dense gradient")
    growth = {}
    few = {name: METHODS[name] for name in ("frozen", "gather", "gather, dense gradient")}
    for features in (25, 100, 500, 2000):
        _, ratios = measure(setup(768, 16, 64, features), few, options.rounds)
        growth[features] = ratios
        print(f"  {features:5d}{ratios['gather']:8.2f}{ratios['gather, dense gradient']:8.2f}")
    results["growth"] = growth
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
