"""What routing costs in one TensorFlow layer, forward and gradient, against the frozen layer.

One thread, float32, 25 features of rank 8, two active a row, shuffled rows; (d=768, B=16, S=64) and (d=2048, B=8,
S=128). Rounds are interleaved, and a figure is the median over rounds of the ratio to the frozen layer in the same
round. Every function gives back its output and its gradients, so that nothing is pruned, and they are held to the
definition before the clock starts: the frozen layer's are to x, the adapted layer's to x, A and B
(``tf.IndexedSlices``, as an optimizer gets them).

    python -m benchmarks.layer.tensorflow_layer [--rounds 30] [--scaling] [--optimizer] [--jit] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from benchmarks.common import (
    Arm,
    Bar,
    Figure,
    Result,
    environment,
    interleave,
    over,
    ratio_table,
)
from benchmarks.guards import guard
from benchmarks.layer.problem import ACTIVE, RANK, SHAPES, Problem, make_problem
from flix.backends.tensorflow import FlixDense, keep_absent

BARS = {768: 1.20, 2048: 1.08}
PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy")
BASE, LORA = "frozen", "Keras `enable_lora(16)`"
Step = Callable[..., Any]


def one_thread() -> None:
    """Let TensorFlow compute with one thread; before it computes anything."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def _set_base(layer: Any, problem: Problem) -> Any:
    layer.build((None, None, problem.d))
    layer._kernel.assign(problem.weight.T)
    layer.bias.assign(problem.bias)
    return layer


def frozen_step(problem: Problem, jit: bool) -> Step:
    """The frozen layer: y and the gradient to x."""
    layer = _set_base(keras.layers.Dense(problem.d), problem)
    layer.trainable = False

    @tf.function(jit_compile=jit)
    def step(x: Any, dy: Any, ids: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return y, tape.gradient(y, x, dy)

    return step


def lora_step(problem: Problem, jit: bool) -> Step:
    """Keras ``enable_lora(16)``, one for all rows: it does not route, and is here for its cost."""
    layer = _set_base(keras.layers.Dense(problem.d), problem)
    layer.enable_lora(ACTIVE * RANK)
    tables = [layer.lora_kernel_a, layer.lora_kernel_b]
    tables[1].assign(np.random.default_rng(1).normal(size=tables[1].shape) * 0.02)

    @tf.function(jit_compile=jit)
    def step(x: Any, dy: Any, ids: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        dx, *grads = tape.gradient(y, [x, *tables], dy)
        return y, dx, grads

    return step


def routed_step(problem: Problem, strategy: str, jit: bool, optimizer: Any = None) -> Step:
    """The adapted layer: y and the gradients to x, A and B; with an optimizer, its step too."""
    layer = FlixDense(problem.d, config=problem.config, name="q", strategy=strategy)
    _set_base(layer, problem)
    tables = [layer.flix_A, layer.flix_B]
    for table, side in zip(tables, "ab", strict=True):
        whole = (
            table.numpy().copy()
        )  # rows of A and of B transposed, by feature; row 0 stands for unused slots
        for feature, pair in problem.pairs.items():
            start = 1 + problem.registry.id(*feature) * problem.rank
            value = getattr(pair, side)
            whole[start : start + problem.rank] = value if side == "a" else value.T
        table.assign(whole)
    if optimizer is not None:
        optimizer.build(tables)

    @tf.function(jit_compile=jit)
    def step(x: Any, dy: Any, ids: Any) -> Any:
        with tf.GradientTape(persistent=False) as tape:
            tape.watch(x)
            y = layer(x, flix_features=ids)
        dx, *grads = tape.gradient(y, [x, *tables], dy)
        if optimizer is not None:
            optimizer.apply(grads, tables)
        return y, dx, [(g.values, g.indices) for g in grads]

    return step


def materialised(outputs: Any) -> Any:
    """A step's results, waited for."""
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), outputs)


def _results(problem: Problem, out: Any) -> dict[str, Any]:
    """y, dx and each feature's gradients of what a step returned."""
    found = {"y": out[0], "dx": out[1]}
    if len(out) == 3 and not isinstance(out[2][0], tuple):
        return found | {"dA": out[2][0], "dB": out[2][1]}
    rank, features = problem.rank, problem.registry.features
    for which, (values, indices) in zip("AB", out[2] if len(out) == 3 else (), strict=False):
        rows: dict[int, Any] = {}
        for index, value in zip(indices, values, strict=True):
            if index:  # row 0 stands for unused slots
                rows[int(index) - 1] = rows.get(int(index) - 1, 0) + value
        for i in sorted({row // rank for row in rows}):
            value = np.stack([rows.get(i * rank + j, np.zeros(problem.d)) for j in range(rank)])
            found[f"d{which} {features[i]}"] = value if which == "A" else value.T
    return found


def guarded_arms(
    problems: dict[str, Problem],
    *,
    strategies: Sequence[str] = ("gather",),
    jit: bool = False,
    optimizer: bool = False,
    peers: bool = False,
) -> list[Arm]:
    """The frozen layer and flix on each problem, once each has been held to the definition.

    Args:
        problems: by the arms' names, alike but for the registered features; ``{}`` in a name stands for the strategy.
        strategies: flix's.
        jit: compiled by XLA.
        optimizer: with a step of AdamW.
        peers: with Keras ``enable_lora`` beside.
    """
    first = next(iter(problems.values()))
    x, dy = tf.constant(first.x), tf.constant(first.dy)

    def arm(name: str, step: Step, problem: Problem) -> Arm:
        ids = tf.constant(problem.ids)
        return Arm(name, lambda: materialised(step(x, dy, ids)), lambda out: _results(problem, out))

    arms = [arm(BASE, frozen_step(first, jit), first)]
    guard(arms[0], first.plain())
    if peers:
        arms.append(arm(LORA, lora_step(first, jit), first))
        guard(arms[1], ("y", "dx", "dA", "dB"))
    expected = first.expected()
    for name, problem in problems.items():
        for how in strategies:
            tuned = keep_absent(keras.optimizers.AdamW(1e-3), whole=jit) if optimizer else None
            made = arm(name.format(how), routed_step(problem, how, jit, tuned), problem)
            unused = [f"dA {f}" for f in problem.registry.features if f not in problem.pairs]
            guard(made, expected, absent=unused)
            arms.append(made)
    return arms


def measure(arms: list[Arm], rounds: int) -> dict[str, Figure]:
    """Ratios over the frozen layer."""
    return over(interleave(arms, rounds, warmup=3), BASE)


def start() -> str:
    """Compute with one thread from now on; where the layers run."""
    one_thread()
    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"


def over_masked(strategy: str, problem: Problem, rounds: int) -> float:
    """Time of a strategy over time of masked; above 1, masked is faster."""
    own, masked = (
        measure({"flix": problem}, rounds, strategy=name)["flix"].median
        for name in (strategy, "masked")
    )
    return own / masked


def suite(smoke: bool = False) -> Result:
    """The TensorFlow layer's part of the benchmark."""
    one_thread()
    shapes = ((64, 4, 16),) if smoke else SHAPES
    rounds, counts = (3, (100,)) if smoke else (25, (25, 100, 500, 2000))
    result = Result("layer-tensorflow", "One layer: TensorFlow", environment=environment(PACKAGES))
    result.method = "As for PyTorch, in a `tf.function` without XLA. Keras `enable_lora` is one LoRA for all rows; it cannot route them."
    columns = {}
    for d, batch, length in shapes:
        problem = {"flix, {}": make_problem(d, batch, length)}
        head = f"d = {d}, {batch} x {length} positions"
        arms = guarded_arms(problem, strategies=("gather", "masked", "auto"), peers=True)
        columns[head] = measure(arms, rounds)
        if d in BARS:
            found = columns[head]["flix, auto"]
            result.bars.append(Bar(f"TensorFlow layer, d = {d}, over frozen", found, BARS[d]))
    result.tables.append(ratio_table("Forward and backward over the frozen layer", columns))
    growing = {f"{n:,} features": make_problem(*shapes[0], n) for n in counts}
    found = measure(guarded_arms(growing), rounds)
    result.tables.append(ratio_table("Registered features", {f"gather, d = {shapes[0][0]}": found}))
    return result


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--strategy", default="gather")
    parser.add_argument("--sizes", type=int, nargs="*", default=[d for d, _, _ in SHAPES])
    parser.add_argument("--scaling", action="store_true", help="registries of 25 to 2000 features")
    parser.add_argument("--optimizer", action="store_true", help="with a step of AdamW")
    parser.add_argument("--jit", action="store_true", help="compiled by XLA")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    one_thread()
    sizes = {d: (batch, length) for d, batch, length in SHAPES}
    results = {}
    for d in args.sizes:
        counts = [25, 100, 500, 2000] if args.scaling else [25]
        problems = {f"{args.strategy}, {n} features": make_problem(d, *sizes[d], n) for n in counts}
        arms = guarded_arms(
            problems, strategies=(args.strategy,), jit=args.jit, optimizer=args.optimizer
        )
        found = measure(arms, args.rounds)
        results[d] = {name: ratio.median for name, ratio in found.items()}
        if not args.json:
            for name, ratio in found.items():
                bar = f"   (bar {BARS[d]:.2f})" if " 25 features" in name else ""
                print(f"d={d}  {name:<28}{ratio.median:6.2f} ± {ratio.spread:.2f}{bar}", flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
