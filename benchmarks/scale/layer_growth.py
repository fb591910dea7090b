"""How a torch layer's cost grows: with registered features, with rank, and with the active features of a row.

Time is that of forward and backward, as in ``layer.py``; memory is the peak of what they allocate. Batches are the same
at every number of registered features. What an optimizer adds is shown beside: it walks over all parameters, though it
moves those of the batch alone.

    python -m benchmarks.scale.layer_growth [--smoke]
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.common import Arm, Bar, Figure, Plot, Result, Table, environment, interleave, over
from benchmarks.guards import guard
from benchmarks.layer.problem import GROWTH, RANK, SHAPES, Problem, make_problem
from benchmarks.layer.torch_arms import flix_arm, frozen_arm, unused_gradients
from benchmarks.memory import arm_peak

RANKS, WIDTHS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 3, 4, 6, 8)
BARS = {2000: 1.04, 10_000: 1.10}
PACKAGES = ("torch", "numpy")


def guarded_arms(problems: dict[str, Problem]) -> list[Arm]:
    """The frozen layer and flix on each problem, all guarded."""
    first = next(iter(problems.values()))
    arms = [frozen_arm(first)]
    guard(arms[0], first.plain())
    for name, problem in problems.items():
        arm = flix_arm(name, problem)
        guard(arm, problem.expected(), absent=unused_gradients(arm, problem))
        arms.append(arm)
    return arms


def optimizer_ms(arm: Arm, parameters: list[torch.nn.Parameter]) -> float:
    """Milliseconds of AdamW's step and zero_grad for the layer, at torch's defaults."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-12)
    seconds = []
    for _ in range(6):
        arm.reset()
        arm.run()
        start = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) * 1e3


def growth(
    counts: tuple[int, ...], shape: tuple[int, int, int], rounds: int
) -> tuple[Table, dict[int, Figure], list[float], list[float]]:
    """Registered features: the table, time over the first count's, time and peak over frozen."""
    problems = {f"{n:,}": make_problem(*shape, n) for n in counts}
    arms = guarded_arms(problems)
    times = interleave(arms, rounds)
    ratios, few = over(times, arms[0].name), over(times, arms[1].name)
    rows: list[list[Any]] = []
    for arm in arms[1:]:
        peak = arm_peak(arm) / 2**20
        parameters = list(arm.model.parameters())
        size = sum(p.numel() for p in parameters if p.requires_grad) * 4 / 2**20
        trained = [p for p in parameters if p.requires_grad]
        tuned = optimizer_ms(arm, trained)
        rows.append([arm.name, ratios[arm.name], few[arm.name], peak, size, tuned])
    head = ["registered", "over frozen", f"over {counts[0]}", "peak MiB", "parameters, MiB"]
    table = Table("Registered features", [*head, "AdamW and zero_grad, ms"], rows)
    medians = [row[1].median for row in rows]
    base = arm_peak(arms[0]) / 2**20
    return table, {n: few[f"{n:,}"] for n in counts}, medians, [row[3] / base for row in rows]


def sweep(title: str, label: str, problems: dict[str, Problem], rounds: int) -> Table:
    """Time and memory over problems that differ in one respect."""
    arms = guarded_arms(problems)
    ratios = over(interleave(arms, rounds), arms[0].name)
    base = arm_peak(arms[0])
    rows = []
    for arm, (name, problem) in zip(arms[1:], problems.items(), strict=True):
        peak = arm_peak(arm)
        active = problem.rank * len(problem.rows[0])
        floor = 1 + 3 * active / problem.d
        rows.append([name, ratios[arm.name], floor, peak / 2**20, peak / base])
    head = [label, "over frozen", "arithmetic alone", "peak MiB", "peak over frozen"]
    return Table(title, head, rows)


def suite(smoke: bool = False) -> Result:
    """The growth part of the benchmark."""
    torch.set_num_threads(1)
    shape = (64, 4, 16) if smoke else SHAPES[0]
    counts = (25, 200) if smoke else GROWTH
    rounds = 3 if smoke else 25
    d, batch, length = shape
    result = Result("scale-layer", "Growth: one torch layer", environment=environment(PACKAGES))
    result.method = (
        f"Forward and backward, d = {d}, {batch} x {length} positions. Rank {RANK} and two active features unless said. "
        "Peak: what torch's allocator held at once, above inputs and parameters. AdamW at torch's defaults."
    )
    table, few, medians, peaks = growth(counts, shape, rounds)
    ranks = {str(r): make_problem(*shape, rank=r) for r in (RANKS[:3] if smoke else RANKS)}
    widths = {str(w): make_problem(*shape, width=w) for w in (WIDTHS[:3] if smoke else WIDTHS)}
    by_rank = sweep(f"Rank, {2} active features", "rank", ranks, rounds)
    by_width = sweep(f"Active features a row, rank {RANK}", "active", widths, rounds)
    result.tables += [table, by_rank, by_width]
    if not smoke:
        for count, bar in BARS.items():
            what = f"torch layer, d = {d}, {count:,} features over {counts[0]}"
            result.bars.append(Bar(what, few[count], bar))
    result.plots += [
        Plot(
            "scale-features.png",
            f"Registered features (torch, d = {d})",
            "registered features",
            "over the frozen layer",
            list(counts),
            {"time": medians, "peak memory": peaks},
            log_x=True,
        ),
        Plot(
            "scale-rank.png",
            f"Active rank of a row (torch, d = {d})",
            "rank x active features",
            "time over the frozen layer",
            [2 * int(r) for r in ranks],
            {
                "measured": [row[1].median for row in by_rank.rows],
                "arithmetic alone": [row[2] for row in by_rank.rows],
            },
            log_x=True,
        ),
    ]
    return result


if __name__ == "__main__":
    from benchmarks.report import section

    print(section(suite("--smoke" in sys.argv).to_dict()))
