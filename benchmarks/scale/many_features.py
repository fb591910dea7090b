"""Hundreds of features in a whole torch model: a training step and its parts, and what is made, saved and loaded.

200 linear layers of d = 256, rank 4, 16 rows of 32 positions, two features a row, of all that are registered. The step
is forward, backward, ``clip_grad_norm_``, fused AdamW and ``zero_grad``; models of 100, 500 and 1,000 features take
their steps in turn. Before the clock starts, output and gradients are held to the definition in float64; features that
no row uses must have no gradient.

It needs flix's public names alone, so that another tree can be measured with it::

    python benchmarks/scale/many_features.py [--smoke] [--rounds 7] [--json FILE]
    PYTHONPATH=/path/to/another/tree python benchmarks/scale/many_features.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy's, in the guards

import flix

if __name__ == "__main__":  # flix may be another tree's; all else is this tree's
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import (
    Arm,
    Bar,
    Figure,
    Result,
    Table,
    environment,
    figure,
    interleave,
    median_ms,
    over,
)
from benchmarks.guards import GuardError, Pair, check_values, reference
from benchmarks.layer.problem import make_registry
from benchmarks.torch_gradients import model_pairs, other_gradients, pair_gradients
from flix.backends.torch import adapt, load, save, to_adapter, trainable_parameters

COUNTS = (100, 500, 1000)
PARTS = ("forward", "backward", "clip", "AdamW", "zero_grad")
PACKAGES = ("torch", "numpy")
BATCHES = 4
"""Different batches; once each has been trained on, the optimizer has a state for all their features."""


@dataclass(frozen=True)
class Sizes:
    """The model's and the batch's."""

    layers: int = 200
    d: int = 256
    rank: int = 4
    rows: int = 16
    length: int = 32


class Stack(nn.Module):
    """Linear layers, each before a residual sum; kernels small enough to neither blow up nor vanish."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(sizes.d, sizes.d) for _ in range(sizes.layers))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.normal_(std=0.05 * sizes.d**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Candidate:
    """A model of some number of features, its optimizer and its batches.

    Args:
        count: features registered.
        sizes: of model and batch.
    """

    def __init__(self, count: int, sizes: Sizes) -> None:
        self.count, self.sizes = count, sizes
        self.registry = make_registry(count)
        base, config = Stack(sizes), flix.FlixConfig(registry=self.registry, ranks=sizes.rank)
        start = time.perf_counter()
        self.model = adapt(base, config).train()
        self.adapting = time.perf_counter() - start
        self.parameters = list(trainable_parameters(self.model))
        with torch.no_grad():  # B too, so that no gradient is zero throughout
            for parameter in self.parameters:
                parameter.uniform_(-0.06, 0.06)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-12, fused=True)
        self.batches = itertools.cycle(self.drawn(number) for number in range(BATCHES))
        shape = (sizes.rows, sizes.length, sizes.d)
        self.x, self.dy = (
            torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
            for seed in (1, 2)
        )

    def drawn(self, number: int) -> Tensor:
        """A batch's routing: one language and one task a row, of all."""
        rng, languages = np.random.default_rng(number), (self.count + 1) // 2
        bounds = ((0, languages), (languages, self.count))
        ids = np.stack([rng.integers(low, high, self.sizes.rows) for low, high in bounds], 1)
        return torch.from_numpy(ids.astype(np.int32))

    def step(self) -> dict[str, Any]:
        """One training step: the output, and the seconds of its parts."""
        ids, times = next(self.batches), [time.perf_counter()]
        y = self.model(self.x, flix_features=ids)
        times.append(time.perf_counter())
        y.backward(self.dy)
        times.append(time.perf_counter())
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        times.append(time.perf_counter())
        self.optimizer.step()
        times.append(time.perf_counter())
        self.optimizer.zero_grad()
        times.append(time.perf_counter())
        spent = dict(zip(PARTS, np.diff(times).tolist(), strict=True))
        return {"y": y.detach(), "norm": norm, "seconds": spent}

    def guard(self) -> None:
        """Hold output and gradients to the definition, and leave none behind.

        Raises:
            GuardError: they differ, or a feature that no row uses has a gradient.
        """
        ids = next(self.batches)
        x = self.x.clone().requires_grad_()
        y = self.model(x, flix_features=ids)
        y.backward(self.dy)
        features = self.registry.features
        rows = [[features[i] for i in row] for row in ids.tolist()]
        used = {f for row in rows for f in row}
        pairs = model_pairs(self.model, used)
        found = {"y": y.detach().numpy(), "dx": x.grad.numpy()}
        found |= pair_gradients(pairs, self.parameters)
        name = f"{self.count} features"
        check_values(name, found, self._expected(rows, used, pairs), 1e-3)
        if others := other_gradients(pairs, self.parameters):
            raise GuardError(f"{name}: {others} parameters that no row uses have gradients")
        self.optimizer.zero_grad()

    def _expected(
        self, rows: list[Any], used: set[Any], pairs: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Output and gradients from the definition, layer by layer."""

        def pairs_of(path: str) -> dict[Any, Pair]:
            of = {f: f"{f[0]}.{f[1]}" for f in used}
            return {
                f: Pair(*(pairs[f"{path}.{part}.{name}"].detach().numpy() for part in "AB"))
                for f, name in of.items()
            }

        paths = [f"layers.{i}" for i in range(self.sizes.layers)]
        kernels = dict(self.model.state_dict())
        inputs = [self.x.numpy().astype(np.float64)]
        gradient = self.dy.numpy().astype(np.float64)

        def part(i: int, dy: Any = None) -> dict[str, Any]:
            weight, bias = (kernels[f"{paths[i]}.{name}"].numpy() for name in ("weight", "bias"))
            return reference(inputs[i], dy, weight, bias, pairs_of(paths[i]), rows)

        for i in range(self.sizes.layers):
            inputs.append(inputs[i] + part(i)["y"])
        expected: dict[str, Any] = {"y": inputs[-1]}
        for i in reversed(range(self.sizes.layers)):
            found = part(i, gradient)
            for group, name in used:
                for which in "AB":
                    expected[f"{paths[i]}.{which}.{group}.{name}"] = found[
                        f"d{which} {(group, name)}"
                    ]
            gradient = gradient + found["dx"]
        expected["dx"] = gradient
        return expected

    def files(self) -> dict[str, float]:
        """Seconds of saving the optimizer's state, the adapter, and loading that into a plain model; MiB of both."""
        with tempfile.TemporaryDirectory() as folder:
            state, adapter = Path(folder, "optimizer.pt"), Path(folder, "adapter")
            times = [time.perf_counter()]
            torch.save(self.optimizer.state_dict(), state)
            times.append(time.perf_counter())
            save(self.model, adapter)
            times.append(time.perf_counter())
            plain = Stack(self.sizes)
            times.append(time.perf_counter())
            loaded = load(plain, adapter)
            times.append(time.perf_counter())
            whole = sum(file.stat().st_size for file in adapter.rglob("*") if file.is_file())
            found = {
                "optimizer saved": times[1] - times[0],
                "save": times[2] - times[1],
                "load": times[4] - times[3],
                "state, MiB": state.stat().st_size / 2**20,
                "adapter, MiB": whole / 2**20,
            }
            values = to_adapter(loaded).tensors
            for name, value in to_adapter(self.model).tensors.items():
                if not np.array_equal(value, values[name]):
                    raise GuardError(
                        f"{self.count} features: {name} was not loaded as it was saved"
                    )
        return found


def measure(counts: Sequence[int], sizes: Sizes, rounds: int) -> Result:
    """All figures of models with these numbers of features."""
    found = [Candidate(count, sizes) for count in counts]
    for candidate in found:
        candidate.guard()
    seconds: dict[str, list[dict[str, float]]] = {f"{c.count:,}": [] for c in found}
    arms = [Arm(f"{c.count:,}", c.step) for c in found]
    times = interleave(
        arms, rounds, warmup=BATCHES, seen=lambda name, out: seconds[name].append(out["seconds"])
    )
    few = over(times, arms[0].name)
    result = Result(
        "scale-features", "Growth: features in a whole model", environment=environment(PACKAGES)
    )
    result.method = (
        f"{sizes.layers} linear layers, d = {sizes.d}, rank {sizes.rank}, {sizes.rows} x {sizes.length} positions, one language "
        "and one task a row, of all that are registered; "
        f"{BATCHES} batches by turns, whose features have all acted before. The step is forward, backward, `clip_grad_norm_`, "
        "`AdamW(fused=True)` and `zero_grad`; the optimizer's state is that of the features that have acted."
    )
    rows, files = [], []
    tail: dict[int, Figure] = {}
    for candidate in found:
        name = f"{candidate.count:,}"
        parts = {part: [spent[part] for spent in seconds[name]] for part in PARTS}
        tail[candidate.count] = figure(
            [
                1e3 * (a + b + c)
                for a, b, c in zip(*(parts[part] for part in PARTS[2:]), strict=True)
            ]
        )
        rows.append(
            [
                name,
                len(candidate.parameters),
                *(median_ms(parts[part]) for part in PARTS),
                median_ms(times[name]),
                few[name],
            ]
        )
        files.append([name, candidate.adapting, *candidate.files().values()])
    head = [
        "features",
        "trainable tensors",
        *(f"{p}, ms" for p in PARTS),
        "step, ms",
        f"over {counts[0]}",
    ]
    result.tables = [
        Table("A training step", head, rows),
        Table(
            "Made, saved and loaded",
            [
                "features",
                "adapt, s",
                "optimizer saved, s",
                "save, s",
                "load, s",
                "optimizer's state, MiB",
                "adapter, MiB",
            ],
            files,
        ),
    ]
    most = counts[-1]
    last = files[-1]
    what = f"{sizes.layers} layers, {most:,} features"
    result.bars = [
        Bar(f"{what}, trainable tensors", float(rows[-1][1]), 1.05 * most),
        Bar(f"{what}, step over {counts[0]}", few[f"{most:,}"], 1.20),
        Bar(f"{what}, clip, AdamW and zero_grad, ms", tail[most], 60.0),
        Bar(f"{what}, adapt, s", last[1], 6.0),
        Bar(f"{what}, optimizer saved, s", last[2], 1.5),
        Bar(f"{what}, save, s", last[3], 6.0),
        Bar(f"{what}, load, s", last[4], 6.0),
    ]
    return result


def suite(smoke: bool = False, rounds: int = 7) -> Result:
    """The many features' part of the benchmark."""
    torch.set_num_threads(1)
    if smoke:
        result = measure((6, 12), Sizes(layers=3, d=16, rank=2, rows=4, length=3), 2)
        result.bars = []
        return result
    return measure(COUNTS, Sizes(), rounds)


def main() -> None:
    """Parse the command line, measure, print."""
    from benchmarks.report import bars_table, section

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="small and quick: does it run?")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = suite(options.smoke, options.rounds).to_dict()
    print(f"flix of {Path(flix.__file__).parents[1]}")
    print(section(found))
    print(bars_table([found]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
