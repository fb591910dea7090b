"""What several processes send, hold and wait for, by the number of registered features: counted, not believed.

Linear layers with features of rank 4, of which twenty act in a step, in processes that average their gradients with
``reduce_features`` (gloo, one thread each). Bytes and calls are counted where they are handed to torch.distributed, by
a wrapper around its collectives that knows nothing of flix. The step is timed in turn with one process's step on the
same batch, by another copy of the model, while the other processes wait::

    python -m benchmarks.scale.processes             # growth, the bar of 1,000 features on 200 layers, and sizes
    python -m benchmarks.scale.processes --smoke
    python -m benchmarks.scale.processes --only sizes    # by arithmetic: a 7B and a 70B base on 8 and 64 cards
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import flix
from benchmarks.layer.problem import make_registry
from benchmarks.scale.many_features import Sizes, Stack
from flix.backends.torch import adapt, trainable_parameters
from flix.backends.torch.distributed import reduce_features

ACTIVE = 20
ROOT = Path(__file__).resolve().parents[2]
GROWTH = ((100, 2), (1_000, 2), (10_000, 2), (100, 4), (1_000, 4), (10_000, 4))
"""Registered features and processes."""


@dataclass(frozen=True)
class Case:
    """One run: what is registered, how many processes, and the model's sizes."""

    count: int
    processes: int
    sizes: Sizes
    steps: int
    timed: bool = False


class Counted:
    """torch.distributed's collectives, counted."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        for name in ("all_reduce", "all_gather", "broadcast"):
            setattr(dist, name, self._around(getattr(dist, name)))

    def _around(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = next(a for a in reversed(args[:2]) if isinstance(a, Tensor))
            self.calls, self.bytes = self.calls + 1, self.bytes + sent.nbytes
            return collective(*args, **kwargs)

        return call

    def taken(self) -> tuple[int, int]:
        """Calls and bytes since the last time."""
        found, self.calls, self.bytes = (self.calls, self.bytes), 0, 0
        return found


def batch(case: Case, number: int, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Inputs and ids of the rows of some processes: together, twenty features act."""
    rng = np.random.default_rng(number)
    half = (case.count + 1) // 2
    active = min(ACTIVE, case.count)
    languages = rng.choice(half, active // 2, replace=False)
    tasks = half + rng.choice(case.count - half, active - active // 2, replace=False)
    sizes, ids, inputs = case.sizes, [], []
    for rank in ranks:
        rows = np.arange(sizes.rows)
        ids.append(np.stack([languages[rows % len(languages)], tasks[rows % len(tasks)]], 1))
        own = np.random.default_rng([number, rank])
        inputs.append(own.normal(size=(sizes.rows, sizes.length, sizes.d)))
    x = torch.from_numpy(np.concatenate(inputs).astype(np.float32))
    return x, torch.from_numpy(np.concatenate(ids).astype(np.int32))


class Trained:
    """A model with its optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = list(trainable_parameters(model))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)

    def step(self, x: Tensor, ids: Tensor) -> float:
        """One step; the loss before it."""
        loss = (self.model(x, flix_features=ids) - x.roll(1, -1)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def worker(case: Case, folder: Path) -> None:
    """One process of a run; writes what it counted to ``<rank>.json``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, everyone = dist.get_rank(), range(case.processes)
    registry = make_registry(case.count)
    model = adapt(Stack(case.sizes), flix.FlixConfig(registry=registry, ranks=case.sizes.rank))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.flix_bank.parameters():
            parameter.uniform_(-0.06, 0.06, generator=generator)
    before = [p.detach().clone() for p in model.flix_bank.parameters()]
    alone = Trained(copy.deepcopy(model)) if case.timed and rank == 0 else None
    whole = Trained(copy.deepcopy(model)) if not case.timed and rank == 0 else None
    counted = Counted()
    dist.barrier()
    start = time.perf_counter()
    reducer = reduce_features(model.train())
    wrapping, started = time.perf_counter() - start, counted.taken()
    trained, per_step, times, acted, losses = Trained(model), [], [], set[int](), []
    for number in range(case.steps):
        x, ids = batch(case, number, [rank])
        acted |= set(ids.flatten().tolist())
        pair = []
        dist.barrier()
        if alone is not None:
            start = time.perf_counter()
            alone.step(x, ids)
            pair.append(time.perf_counter() - start)
        counted.taken()
        dist.barrier()
        start = time.perf_counter()
        own = torch.tensor(trained.step(x, ids), dtype=torch.float64)
        pair.append(time.perf_counter() - start)
        per_step.append(counted.taken())
        times.append(pair)
        dist.all_reduce(own)
        one = None if whole is None else whole.step(*batch(case, number, everyone))
        losses.append([float(own) / case.processes, one])
    if per_step[-1] != (reducer.last.calls, reducer.last.bytes):
        raise RuntimeError(f"counted {per_step[-1]}, but the reducer says {reducer.last}")
    held = list(model.flix_bank.parameters())
    moved = {i for i, (a, b) in enumerate(zip(before, held, strict=True)) if not torch.equal(a, b)}
    if moved != acted:
        raise RuntimeError("other features moved than those that acted")
    state = trained.optimizer.state
    found = {
        "wrapping": wrapping,
        "start": started,
        "steps": per_step,
        "times": times,
        "losses": losses,
        "feature": held[0].nbytes,
        "active": min(ACTIVE, case.count),
        "parameters": sum(p.nbytes for p in held),
        "optimizer": sum(v.nbytes for s in state.values() for v in s.values() if torch.is_tensor(v)),
    }  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case) -> list[dict[str, Any]]:
    """What each process counted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        told = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(case.processes)}  # fmt: skip
        command = [sys.executable, "-m", __spec__.name, "--worker", json.dumps(asdict(case)), "--folder", folder]  # fmt: skip
        started = [
            subprocess.Popen(command, env={**told, "RANK": str(rank)}, cwd=ROOT)
            for rank in range(case.processes)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit(f"a process failed: {codes}")
        return [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(case.processes)]


def table(cases: Sequence[Case]) -> str:
    """Runs, as a table in Markdown; the constants that the counted bytes follow."""
    rows, known = [], []
    for case in cases:
        first = run(case)[0]
        calls, sent = first["steps"][-1]
        active = first["active"] * first["feature"]
        apart = max(abs(a - b) for a, b in first["losses"] if b is not None)
        known.append((case.count, active, sent))
        rows.append(
            f"| {case.count:,} | {case.processes} | {calls} | {sent:,} | {sent / active:.4f} | {first['parameters']:,} "
            f"| {first['optimizer']:,} | {first['start'][1]:,} | {first['wrapping']:.2f} | {apart:.1e} |"
        )
        print(rows[-1], file=sys.stderr, flush=True)
    head = (
        "| registered | processes | calls a step | bytes a step | over the active features' | bytes of features held | of the optimizer's state "
        "| bytes at the start | reduce_features, s | loss, from one process's |"
    )
    told = np.array([[count, sent - active] for count, active, sent in known], float)
    slope, constant = np.polyfit(told[:, 0], told[:, 1], 1)
    constants = f"bytes a step = those of the active features + {slope:.3f} x registered + {constant:,.0f} (least squares)"
    return "\n".join([head, "|" + "---|" * 10, *rows, "", constants])


def bar(case: Case) -> str:
    """The bar's run: bytes, wrapping, and the step beside one process's, in words."""
    found = run(case)
    first = found[0]
    calls, sent = first["steps"][-1]
    active = first["active"] * first["feature"]
    pairs = first["times"][2:]
    ratios = [two / one for one, two in pairs]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    one, two = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    return (
        f"{case.count:,} features of rank {case.sizes.rank}, {case.sizes.layers} layers of d = {case.sizes.d}, {first['active']} active, "
        f"{case.processes} processes: {sent:,} bytes in {calls} calls a step, {sent / active:.4f} of the active features'; "
        f"reduce_features {max(f['wrapping'] for f in found):.2f} s; step {two:.0f} ms beside {one:.0f} ms of one process, "
        f"ratio {middle:.2f} (quartiles {low:.2f} to {high:.2f}, {len(pairs)} steps)"
    )


# By arithmetic: linear layers (d_in, d_out) of one block, and the number of blocks.
BASES = {
    "7B": ([(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)], 32),
    "70B": ([(8192, 8192)] * 2 + [(8192, 1024)] * 2 + [(8192, 28672)] * 2 + [(28672, 8192)], 80),
}


def sizes_table(features: int = 1_000, rank: int = 4, a_card: int = 5) -> str:
    """What a step sends, for bases of these sizes; every card's batch has some features of its own."""
    lines = [
        "| base | cards | features, all | active a step | DDP sends a card | reduce_features sends a card | of DDP's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (layers, blocks) in BASES.items():
        each = 4 * rank * blocks * sum(d_in + d_out for d_in, d_out in layers)
        for cards in (8, 64):
            active = min(features, a_card * cards)
            ring = 2 * (cards - 1) / cards
            told = 1024 * -(-(32 + features + blocks * (len(layers) + 2)) // 1024)
            every, some = ring * features * each, ring * (active * each + told)
            lines.append(
                f"| {name} | {cards} | {features * each / 1e9:,.1f} GB | {active} | {every / 1e9:,.1f} GB | {some / 1e9:,.2f} GB "
                f"| {some / every:.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small and quick: does it run?")
    parser.add_argument("--only", choices=("growth", "bar", "sizes"))
    parser.add_argument("--steps", type=int, default=20, help="of the bar's run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        given = json.loads(options.worker)
        worker(Case(**{**given, "sizes": Sizes(**given["sizes"])}), options.folder)
        return
    growth = [Case(n, p, Sizes(20, 64, rows=10, length=4), 4) for n, p in GROWTH]
    large = Case(1_000, 2, Sizes(200, 64), options.steps, timed=True)
    if options.smoke:
        small = Sizes(2, 8, rank=2, rows=10, length=3)
        growth = [Case(n, 2, small, 3) for n in (6, 30)]
        large = replace(large, count=30, sizes=small, steps=4)
    if options.only in (None, "growth"):
        print(table(growth))
    if options.only in (None, "bar"):
        print(bar(large))
    if options.only in (None, "sizes"):
        print(sizes_table())


if __name__ == "__main__":
    main()
