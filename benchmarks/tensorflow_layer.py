"""What routing costs in one TensorFlow layer, forward and gradient, against the frozen layer.

One thread, float32, 25 features of rank 8, two active a row, shuffled rows; (d=768, B=16, S=64) and (d=2048, B=8,
S=128). Rounds are interleaved, and a figure is the median over rounds of the ratio to the frozen layer in the same
round. Both functions give back their output and their gradients, so that nothing is pruned: the frozen layer's are to
x, the adapted layer's to x, A and B (``tf.IndexedSlices``, as an optimizer gets them).

    python benchmarks/tensorflow_layer.py [--rounds 30] [--scaling] [--optimizer] [--jit] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import flix
from flix.backends.tensorflow import FlixDense, keep_absent

SHAPES = {768: (16, 64), 2048: (8, 128)}
BARS = {768: 1.30, 2048: 1.12}


def make_config(features: int, rank: int = 8) -> flix.FlixConfig:
    """Half languages, half tasks, all of one rank."""
    tasks = features // 2
    groups = {
        "language": [f"l{i}" for i in range(features - tasks)],
        "task": [f"t{i}" for i in range(tasks)],
    }
    return flix.FlixConfig(registry=flix.FeatureRegistry(groups), ranks=rank)


def make_ids(config: flix.FlixConfig, batch: int) -> np.ndarray:
    """One language and one task a row, at random; the same draw among the first 25 features for any registry."""
    rng = np.random.default_rng(0)
    languages = config.registry.ids_of("language")[:13]
    tasks = config.registry.ids_of("task")[:12]
    return np.stack([rng.choice(languages, batch), rng.choice(tasks, batch)], 1).astype(np.int32)


def frozen_step(d: int, jit: bool):
    """The frozen layer: y and the gradient to x."""
    layer = keras.layers.Dense(d)
    layer.build((None, None, d))
    layer.trainable = False

    @tf.function(jit_compile=jit)
    def step(x, dy, ids):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return y, tape.gradient(y, x, dy)

    return step


def routed_step(d: int, config: flix.FlixConfig, strategy: str, jit: bool, optimizer=None):
    """The adapted layer: y and the gradients to x, A and B; with an optimizer, its step too."""
    layer = FlixDense(d, config=config, name="q", strategy=strategy)
    layer.build((None, None, d))
    tables = [layer.flix_A, layer.flix_B]
    tables[1].assign(np.random.default_rng(1).normal(size=tables[1].shape) * 0.02)
    if optimizer is not None:
        optimizer.build(tables)

    @tf.function(jit_compile=jit)
    def step(x, dy, ids):
        with tf.GradientTape(persistent=False) as tape:
            tape.watch(x)
            y = layer(x, flix_features=ids)
        dx, *grads = tape.gradient(y, [x, *tables], dy)
        if optimizer is not None:
            optimizer.apply(grads, tables)
        return y, dx, [(g.values, g.indices) for g in grads]

    return step


def materialised(outputs) -> None:
    """Wait for a step's results."""
    for tensor in tf.nest.flatten(outputs):
        tensor.numpy()


def ratios(steps: dict, inputs: dict, rounds: int, base: str) -> dict[str, float]:
    """Median over interleaved rounds of each step's time over the base's."""
    for name, step in steps.items():
        for _ in range(3):
            materialised(step(*inputs[name]))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        names = list(steps)
        for name in names if number % 2 else names[::-1]:
            start = time.perf_counter()
            materialised(steps[name](*inputs[name]))
            times[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(t / b for t, b in zip(times[name], times[base], strict=True))
        for name in steps
    }


def measure(d: int, registries: list[int], args: argparse.Namespace) -> dict[str, float]:
    """Ratios at one size, for registries of several sizes."""
    batch, length = SHAPES[d]
    rng = np.random.default_rng(2)
    x = tf.constant(rng.normal(size=(batch, length, d)).astype(np.float32))
    dy = tf.constant(rng.normal(size=(batch, length, d)).astype(np.float32))
    steps, inputs = {"frozen": frozen_step(d, args.jit)}, {"frozen": (x, dy, tf.constant([[0]]))}
    for features in registries:
        config = make_config(features)
        optimizer = None
        if args.optimizer:
            optimizer = keep_absent(keras.optimizers.AdamW(1e-3), whole=args.jit)
        name = f"{args.strategy}, {features} features"
        steps[name] = routed_step(d, config, args.strategy, args.jit, optimizer)
        inputs[name] = (x, dy, tf.constant(make_ids(config, batch)))
    return ratios(steps, inputs, args.rounds, "frozen")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--strategy", default="gather")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SHAPES))
    parser.add_argument("--scaling", action="store_true", help="registries of 25 to 2000 features")
    parser.add_argument("--optimizer", action="store_true", help="with a step of AdamW")
    parser.add_argument("--jit", action="store_true", help="compiled by XLA")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    results = {}
    for d in args.sizes:
        registries = [25, 100, 500, 2000] if args.scaling else [25]
        results[d] = measure(d, registries, args)
        if not args.json:
            for name, ratio in results[d].items():
                bar = f"   (bar {BARS[d]:.2f})" if "25 features" in name else ""
                print(f"d={d}  {name:<28}{ratio:6.2f}{bar}", flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
