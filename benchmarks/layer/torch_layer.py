"""One torch layer, forward and backward, over the frozen layer: flix beside PEFT.

Method: float32, one thread unless told; every round runs each candidate once, in turn, and a candidate's figure is the
median over rounds of its time over the frozen layer's in the same round, so that drift of the machine cancels.
The output feeds a backward with a fixed gradient of full size, so nothing can be pruned; gradients are taken with
respect to the input and the adapter's parameters, and the base is frozen. Gradients are set to None before each run, as
an optimizer's zero_grad does. Before the clock starts, every candidate's output and gradients are held to the
definition.

    python -m benchmarks.layer.torch_layer [--rounds 21] [--threads 1] [--json FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.common import (
    Arm,
    Bar,
    Figure,
    Plot,
    Result,
    Table,
    environment,
    interleave,
    median_ms,
    over,
    ratio_table,
)
from benchmarks.guards import guard
from benchmarks.layer.problem import ACTIVE, GROWTH, RANK, SHAPES, Problem, make_problem
from benchmarks.layer.torch_arms import (
    flix_arm,
    frozen_arm,
    peft_loop_arm,
    peft_names_arm,
    peft_single_arm,
    unused_gradients,
)
from benchmarks.memory import arm_peak

FIRST = "flix, auto, the first layer that sees a batch"
LATER = "**flix, auto, any layer after it**"
SINGLE = f"PEFT, one LoRA of rank {ACTIVE * RANK} for all rows"
AGAINST = "the same, over PEFT's one LoRA"
BARS = {768: (1.18, 1.12), 2048: (1.07, 1.05)}  # forward and backward; forward alone
SHORT = ((3, 12, "24-slot union", 1.2), (25, 13, "200-slot union", 1.9))
MEMORY_BAR = 1.5
PEFT_BAR = 0.95
PACKAGES = ("torch", "peft", "transformers", "numpy")


def guarded(arms: list[Arm], problem: Problem, backward: bool) -> list[Arm]:
    """The arms, once each has been held to the definition."""
    expected, plain = problem.expected(), problem.plain()
    for arm in arms:
        absent: list[str] = []
        if arm.name == "frozen layer":
            wanted = plain
        elif "for all rows" in arm.name:
            wanted = dict.fromkeys(("y", "dx", "dA", "dB"))  # another sum than the rows'
        else:
            wanted, absent = expected, unused_gradients(arm, problem)
        if not backward:
            wanted, absent = {"y": wanted["y"]}, []
        guard(arm, wanted, absent=absent)
    return arms


def compare(
    arms: list[Arm], problem: Problem, rounds: int, backward: bool = True
) -> tuple[dict[str, Figure], float]:
    """Each arm over the first, flix over PEFT's one LoRA, too; and the first's milliseconds."""
    times = interleave(guarded(arms, problem, backward), rounds)
    base, ratios = arms[0].name, over(times, arms[0].name)
    if LATER in times and SINGLE in times:
        ratios[AGAINST] = over(times, SINGLE)[LATER]
    return ratios, median_ms(times[base])


def both_ways(problem: Problem, rounds: int, growth: tuple[int, ...]) -> dict[str, Figure | float]:
    """Forward and backward of all candidates, and flix over growing registries."""
    d, batch, length = problem.d, *problem.x.shape[:2]
    arms = [
        frozen_arm(problem),
        peft_single_arm(problem, ACTIVE * RANK),
        peft_loop_arm(problem),
        peft_names_arm(problem),
        flix_arm("flix, gather", problem, "gather"),
        flix_arm("flix, masked", problem, "masked"),
        flix_arm(FIRST, problem),
        flix_arm(LATER, problem, later=True),
    ]
    for count in growth:
        more = make_problem(d, batch, length, count)
        arms.append(flix_arm(f"flix, auto, {count:,} features", more))
    ratios, ms = compare(arms, problem, rounds)
    return {"frozen layer, ms": ms, **ratios}


def forward_alone(problem: Problem, rounds: int) -> dict[str, Figure | float]:
    """The forward alone, without autograd, as evaluation runs it."""
    arms = [
        frozen_arm(problem, False),
        peft_single_arm(problem, ACTIVE * RANK, False),
        peft_names_arm(problem, False),
        flix_arm("flix, gather", problem, "gather", False),
        flix_arm("flix, masked", problem, "masked", False),
        flix_arm(FIRST, problem, "auto", False),
        flix_arm(LATER, problem, "auto", False, later=True),
    ]
    ratios, ms = compare(arms, problem, rounds, False)
    return {"frozen layer, ms": ms, **ratios}


def short_inputs(
    d: int, batches: tuple[int, ...], rounds: int
) -> tuple[Table, dict[str, dict[int, Figure]]]:
    """One position a row, over unions of two sizes, by batch size."""
    found: dict[str, dict[int, Figure]] = {}
    rows: list[list] = []
    for features, drawn, label, _ in SHORT:
        for batch in batches:
            problem = make_problem(d, batch, 1, features, drawn=drawn)
            arms = [
                frozen_arm(problem),
                flix_arm("gather", problem, "gather"),
                flix_arm("masked", problem, "masked"),
                flix_arm("auto, first layer", problem),
                flix_arm("auto, later layers", problem, later=True),
            ]
            union = RANK * len(problem.pairs)
            ratios, _ = compare(arms, problem, rounds)
            rows.append(
                [f"{batch} rows, {union} slots together", *(ratios[a.name] for a in arms[1:])]
            )
            found.setdefault(label, {})[batch] = ratios["auto, later layers"]
    title = f"One position a row, d = {d}: forward and backward over the frozen layer"
    return Table(
        title, ["", "gather", "masked", "auto, first layer", "auto, later layers"], rows
    ), found


def memory_rows(problems: list[Problem]) -> tuple[Table, dict[int, float]]:
    """Peak memory of forward and backward."""
    ratios: dict[int, float] = {}
    columns: list[list] = []
    for problem in problems:
        arms = [
            frozen_arm(problem),
            peft_single_arm(problem, ACTIVE * RANK),
            flix_arm("flix, gather", problem, "gather"),
            flix_arm("flix, masked", problem, "masked"),
            flix_arm(FIRST, problem),
        ]
        peaks = [arm_peak(arm) for arm in guarded(arms, problem, True)]
        ratios[problem.d] = peaks[-1] / peaks[0]
        columns.append([p / 2**20 for p in peaks] + [p / peaks[0] for p in peaks])
    names = [arm.name for arm in arms]
    rows = [
        [name, *(cell for c in columns for cell in (c[i], c[len(names) + i]))]
        for i, name in enumerate(names)
    ]
    head = [cell for p in problems for cell in (f"d = {p.d}, MiB", "over frozen")]
    note = (
        "The most bytes that torch's allocator held at once during forward and backward, above the inputs and parameters "
        "that were there before (output, saved tensors, gradients, temporaries), recorded by torch.profiler."
    )
    return Table("Peak memory of one layer", ["", *head], rows, note), ratios


def start() -> str:
    """Compute with one thread from now on; where the layers run."""
    torch.set_num_threads(1)
    return "cpu"


def over_masked(strategy: str, problem: Problem, rounds: int) -> float:
    """Time of a strategy over time of masked, in a layer that is not the batch's first; above 1, masked is faster."""
    arms = [flix_arm(name, problem, name, later=True) for name in ("masked", strategy)]
    return compare(arms, problem, rounds)[0][strategy].median


def _plotted(name: str) -> bool:
    return name != AGAINST and "ms" not in name and "features" not in name


def suite(smoke: bool = False) -> Result:
    """The torch layer's part of the benchmark."""
    torch.set_num_threads(1)
    shapes = ((64, 4, 16),) if smoke else SHAPES
    growth = (100,) if smoke else tuple(n for n in GROWTH if 25 < n <= 2000)
    result = Result("layer-torch", "One layer: PyTorch", environment=environment(PACKAGES))
    result.method = (
        "Forward and backward of one adapted linear layer over the frozen layer; gradients of the input and the adapter, base "
        "frozen; 25 features of rank 8 unless said, two active in every row, rows in shuffled order. flix places a "
        "batch's routing once for all layers of a model; the first layer's cost, which does it, and that of the others are both "
        "shown, and the bars are for the latter."
    )
    problems = [make_problem(*shape) for shape in shapes]
    columns, forward = {}, {}
    for problem in problems:
        batch, length, d = problem.x.shape
        rounds = 3 if smoke else 25 if d < 2048 else 15
        head = f"d = {d}, {batch} x {length} positions"
        columns[head] = both_ways(problem, rounds, growth if problem is problems[0] else ())
        forward[head] = forward_alone(problem, rounds)
        if d in BARS:
            both, alone = BARS[d]
            result.bars += [
                Bar(f"torch layer, d = {d}, over frozen", columns[head][LATER], both),
                Bar(
                    f"torch layer, d = {d}, over PEFT's one LoRA", columns[head][AGAINST], PEFT_BAR
                ),
                Bar(f"torch layer, d = {d}, forward alone", forward[head][LATER], alone),
            ]
    note = "`adapter_names` is timed in evaluation mode: PEFT refuses it in training."
    result.tables += [
        ratio_table("Forward and backward over the frozen layer", columns, note=note),
        ratio_table("Forward alone (no autograd) over the frozen layer", forward),
    ]
    result.plots.append(
        Plot(
            "layer-torch.png",
            "One torch layer, forward and backward",
            "",
            "time over the frozen layer",
            [name.strip("*") for name in columns[head] if _plotted(name)],
            {h: [f.median for name, f in c.items() if _plotted(name)] for h, c in columns.items()},
        )
    )
    rounds = 3 if smoke else 25
    batches = (8,) if smoke else (16, 64, 512)
    table, short = short_inputs(shapes[0][0], batches, rounds)
    result.tables.append(table)
    memory, peaks = memory_rows(problems)
    result.tables.append(memory)
    if not smoke:
        for _, _, label, bar in SHORT:
            result.bars.append(
                Bar(f"torch layer, one position a row, 512 rows, {label}", short[label][512], bar)
            )
        for d, ratio in peaks.items():
            result.bars.append(
                Bar(f"torch layer, d = {d}, peak memory over frozen", ratio, MEMORY_BAR)
            )
    return result


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small and quick: does it run?")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = ((256, 8, 32),) if options.smoke else SHAPES
    rounds = 5 if options.smoke else options.rounds
    growth = (100,) if options.smoke else (100, 500, 2000)
    results = {}
    for d, batch, length in shapes:
        problem = make_problem(d, batch, length)
        for what, ratios in (
            ("forward and backward", both_ways(problem, rounds, growth)),
            ("forward alone", forward_alone(problem, rounds)),
        ):
            ms = ratios.pop("frozen layer, ms")
            print(f"d={d}, B={batch}, S={length}, {what}: frozen {ms:.1f} ms")
            for name, ratio in ratios.items():
                print(f"  {name:<44}{ratio.median:6.3f} ± {ratio.spread:.3f}")
            results[f"d={d}, B={batch}, S={length}, {what}"] = {
                "frozen layer, ms": ms,
                **{name: ratio.median for name, ratio in ratios.items()},
            }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
