"""The Pallas kernels of the JAX backend on the card: do they compile, what do they compute, how long do they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flix
from benchmarks.common import Table
from benchmarks.gpu.record import Record
from benchmarks.layer.problem import RANK, make_registry
from flix.backends.jax import gather, init, linear_rows, touched

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Products of float32 are exact on the card only where XLA is asked for it; see ``run``."""


def draw_ids(features: int, rows: int, languages: int, tasks: int) -> Any:
    """One language and one task a row, of the first so many of each."""
    rng = np.random.default_rng(0)
    first = features - features // 2
    drawn = [rng.integers(0, languages, rows), first + rng.integers(0, tasks, rows)]
    return np.stack(drawn, 1).astype(np.int32)


class Layer:
    """One layer's arrays and its compiled steps.

    Args:
        shape: (rows, positions, d).
        features: registered.
        dtype: of inputs and kernel.
        ids: the routing.
    """

    def __init__(self, shape: tuple[int, int, int], features: int, dtype: str, ids: Any) -> None:
        count, length, d = shape
        rng = np.random.default_rng(1)

        def normal(*sizes: int) -> Any:
            return jnp.asarray(rng.standard_normal(sizes, np.float32), dtype)

        config = flix.FlixConfig(registry=make_registry(features), ranks=RANK)
        self.x, self.g = normal(count, length, d), normal(count, length, d)
        self.kernel = normal(d, d) * jnp.asarray(d**-0.5, dtype)
        bank = init(config, {"layer": (d, d)})
        tables = {"A": d**-0.5, "B": 0.5 * RANK**-0.5}
        drawn = {
            name: jnp.asarray(
                rng.standard_normal(getattr(bank["layer"], name).shape, np.float32) * std
            )
            for name, std in tables.items()
        }
        layer = type(bank["layer"])(drawn["A"], drawn["B"], bank["layer"].spec)
        self.ids = jnp.asarray(ids)
        self.present = touched(self.ids, features)
        self.rows = gather({"layer": layer}, self.present)
        self.lora = (normal(d, 2 * RANK), normal(2 * RANK, d))

    def frozen(self, x: Any, rows: Any) -> Any:
        """The frozen layer."""
        return x @ self.kernel

    def one_lora(self, x: Any, pair: Any) -> Any:
        """One LoRA for all rows."""
        return x @ self.kernel + (x @ pair[0]) @ pair[1]

    def by(self, strategy: str) -> Callable[[Any, Any], Any]:
        """flix by a strategy."""

        def call(x: Any, rows: Any) -> Any:
            return linear_rows(
                x, self.kernel, rows["layer"], self.ids, self.present, strategy=strategy
            )

        return call

    def compiled(
        self, call: Callable[[Any, Any], Any], trained: Any
    ) -> tuple[Callable[[], Any], float]:
        """(output and gradients of a call, compiled; the seconds that compiling took)."""

        def step(x: Any, trained: Any, g: Any) -> Any:
            y, back = jax.vjp(call, x, trained)
            return y, back(g)

        start = time.perf_counter()
        made = jax.jit(step).lower(self.x, trained, self.g).compile()
        seconds = time.perf_counter() - start
        return lambda: jax.block_until_ready(made(self.x, trained, self.g)), seconds


def distance(found: Any, expected: Any) -> float:
    """The largest relative distance of any array; infinite where one is not finite."""
    far = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        if not np.isfinite(a).all():
            return float("inf")
        far = max(far, float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)))
    return far


def check(record: Record, name: str, layer: Layer, dtype: str) -> float:
    """The kernels' output and gradients against gather's.

    Raises:
        AssertionError: they are too far apart.
    """
    fused, seconds = layer.compiled(layer.by("fused"), layer.rows)
    record.put(f"{name}: seconds to compile", round(seconds, 2))
    plain, _ = layer.compiled(layer.by("gather"), layer.rows)
    far = distance(fused(), plain())
    record.put(f"{name}: off by", far)
    assert far < TOLERANCE[dtype], f"fused is off by {far:.1e} from gather"
    return far


def measure(record: Record, title: str, layer: Layer, rounds: int) -> None:
    """A table of forward and backward."""
    candidates: dict[str, tuple[Any, Any]] = {
        "frozen layer": (layer.frozen, {}),
        f"one LoRA of rank {2 * RANK}": (layer.one_lora, layer.lora),
    }
    for strategy in ("fused", "gather", "masked", "auto"):
        candidates[f"flix, {strategy}"] = (layer.by(strategy), layer.rows)
    steps, compiling = {}, {}
    for name, (call, trained) in candidates.items():
        made = record.attempt(f"{title}: {name}", lambda c=call, t=trained: layer.compiled(c, t))
        if made is not None:
            steps[name], compiling[name] = made
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(0 if record.dry else -2, rounds):
        for name, step in steps.items() if number % 2 else reversed(steps.items()):
            start = time.perf_counter()
            held = step()
            if number >= 0:
                times[name].append(time.perf_counter() - start)
            del held
    base = times["frozen layer"]
    rows = []
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        rows.append([name, statistics.median(seconds) * 1e3, ratio, compiling[name]])
    head = ["", "ms", "over frozen", "compiled in, s"]
    note = "One step at a time, the host's part included."
    record.table(Table(title, head, rows, note))
    record.put(title, {row[0]: row[1:] for row in rows})


def run(record: Record) -> None:
    """The section."""
    jax.config.update("jax_default_matmul_precision", "highest")
    record.put("platform", jax.default_backend())
    small = [(4, 3, 48), (4, 70, 48)]
    large, many = ((2, 16, 16), 12) if record.dry else ((16, 512, 4096), 1000)
    for dtype in TOLERANCE:
        # The large one in the dtype that is timed alone: in float32 it takes 22 s, most of them to compile.
        shapes = (*small, large) if dtype == "bfloat16" else small
        for shape in small[:1] if record.dry else shapes:
            name = f"{dtype}, {' x '.join(map(str, shape))}"

            def one(name: str = name, shape: Any = shape, dtype: str = dtype) -> float:
                ids = draw_ids(25, shape[0], 12, 12)
                return check(record, name, Layer(shape, 25, dtype, ids), dtype)

            record.attempt(f"{name}: fused against gather", one, needs=10.0)
    jax.config.update("jax_default_matmul_precision", None)
    count, length, d = large
    rounds = 1 if record.dry else 15
    for features in (25, many):
        half = features // 2
        drawn = min(12, half) if features == 25 else half
        layer = Layer(large, features, "bfloat16", draw_ids(features, count, drawn, drawn))
        title = f"Pallas: {features:,} features, bfloat16, d = {d}, {count} x {length} positions"
        record.attempt(title, lambda t=title, layer=layer: measure(record, t, layer, rounds), 12.0)
    rows = 3 if record.dry else 64
    layer = Layer((rows, 1, d), 25, "bfloat16", draw_ids(25, rows, 12, 12))
    title = f"Pallas: {rows} rows of one position, 25 features, bfloat16, d = {d}"
    record.attempt(title, lambda: measure(record, title, layer, rounds), 12.0)
