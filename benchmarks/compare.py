"""Two trees of flix in one sitting: the layer and model benchmarks before and after a change.

Every comparison runs in processes of its own, one after another, with one thread on one core: before, after, after,
before. flix comes from the tree that is named, all else from this one, so that both are measured alike; a figure is the
median over all rounds of an arm's time over another's in the same round, and the last column compares the two trees'.
Both trees must compute the same. Some ten minutes; with ``--all`` (GPT-2, whole JAX and Keras models) twice that.

    python -m benchmarks.compare --before DIR [--after DIR] [--only torch-layer,t5] [--repeats 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import environment, figure
from benchmarks.comparisons import COMPARISONS, DEFAULT
from benchmarks.report import ROOT, write_table
from benchmarks.run import ENVIRONMENT

# flix from one tree, and then everything else from another.
BOOT = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import flix, flix.backends
sys.path[0] = sys.argv.pop(1)
runpy.run_module("benchmarks.comparisons", run_name="__main__", alter_sys=True)
"""
WORSE = 1.03
"""From here on a figure counts as worse."""


class ComparisonError(RuntimeError):
    """A comparison did not come to its end, or the trees compute different numbers."""


def run(name: str, tree: Path, core: int | None, smoke: bool) -> dict[str, Any]:
    """One comparison with one tree's flix, in a process of its own.

    Raises:
        ComparisonError: it ended with an error, or ran another flix.
    """
    words = [name, "smoke" if smoke else "full"]
    command = [sys.executable, "-P", "-c", BOOT, str(tree), str(ROOT), *words]
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def pin() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})

    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, **ENVIRONMENT},
        capture_output=True,
        text=True,
        preexec_fn=pin,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise ComparisonError(
            f"{name} with {tree} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    found: dict[str, Any] = json.loads(lines[-1])
    if Path(found["flix"]).resolve() != tree.resolve():
        raise ComparisonError(
            f"{name} ran the flix of {found['flix']} where that of {tree} was asked for"
        )
    return found


def rows_of(name: str, runs: dict[str, list[dict[str, Any]]]) -> list[list[Any]]:
    """The rows of one comparison: figure, before, after, after over before, bar.

    Args:
        name: the comparison's.
        runs: what :func:`run` returned, by "before" and "after".

    Raises:
        ComparisonError: the trees compute different numbers.
    """
    checks = {side: found[0]["check"] for side, found in runs.items()}
    if abs(checks["before"] - checks["after"]) > 1e-3 * abs(checks["before"]):
        raise ComparisonError(f"{name}: the trees compute different numbers: {checks}")
    rows: list[list[Any]] = []
    first = runs["before"][0]
    for what in first["ratios"]:
        medians = {}
        for side, found in runs.items():
            medians[side] = figure([r for one in found for r in one["ratios"][what]])
        change = medians["after"].median / medians["before"].median
        bar = first["bars"].get(what)
        met = None if bar is None else round(medians["after"].median, 2) <= bar
        aim = "" if met is None else f"at most {bar:.2f}: {'yes' if met else '**no**'}"
        shown = [vars(medians[side]) for side in ("before", "after")]
        worse = " **worse**" if change > WORSE else ""
        rows.append([f"{name}: {what}", *shown, f"{change:.3f}{worse}", aim])
    for arm in first["ms"]:
        ms = [statistics.median(one["ms"][arm] for one in runs[s]) for s in ("before", "after")]
        rows.append([f"{name}: {arm}, ms", *ms, f"{ms[1] / ms[0]:.3f}", ""])
    return rows


def chosen(only: str, every: bool = False) -> list[str]:
    """The comparisons that a list of names, or of their beginnings, stands for.

    Raises:
        SystemExit: a name that stands for nothing.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if not any(known.startswith(name) for known in COMPARISONS):
            raise SystemExit(f"no comparison {name!r}; there are {', '.join(COMPARISONS)}")
    if not names:
        return list(COMPARISONS if every else DEFAULT)
    return [known for known in COMPARISONS if any(known.startswith(name) for name in names)]


def order(repeats: int) -> Sequence[str]:
    """Sides in the order of their runs: each pair turned round, so that neither always follows the other."""
    pairs = [("before", "after") if i % 2 == 0 else ("after", "before") for i in range(repeats)]
    return [side for pair in pairs for side in pair]


def main() -> None:
    """Parse the command line, measure, print.

    Raises:
        SystemExit: a comparison failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the tree before the change")
    parser.add_argument("--after", type=Path, default=ROOT, help="the tree after it; default: this")
    parser.add_argument("--only", default="", help="comparisons, or beginnings of their names")
    parser.add_argument("--all", action="store_true", help="GPT-2, JAX and Keras models, too")
    parser.add_argument("--repeats", type=int, default=2, help="processes a tree and comparison")
    parser.add_argument("--core", type=int, help="the core to run on; default: the last")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    trees = {"before": options.before.resolve(), "after": options.after.resolve()}
    core = options.core
    if core is None and hasattr(os, "sched_getaffinity"):
        core = max(os.sched_getaffinity(0))
    where = environment(("torch", "peft", "transformers", "jax", "tensorflow-cpu", "numpy"))
    print(json.dumps(where), flush=True)
    head = ["", "before", "after", "after / before", "aim"]
    table, raw, failed = [], {}, []
    for name in chosen(options.only, options.all):
        start = time.perf_counter()
        runs: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
        try:
            for side in order(options.repeats):
                runs[side].append(run(name, trees[side], core, options.smoke))
            rows = rows_of(name, runs)
        except ComparisonError as error:
            failed.append(name)
            print(error, file=sys.stderr, flush=True)
            continue
        table += rows
        raw[name] = runs
        loads = [load for found in runs.values() for one in found for load in one["load"]]
        seconds = time.perf_counter() - start
        print(f"\n{name}: {seconds:.0f} s, load {min(loads):.1f} to {max(loads):.1f}")
        print(write_table(head, rows), flush=True)
    if options.json:
        found = {"environment": where, "head": head, "rows": table, "runs": raw}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    worse = [row[0] for row in table if "worse" in row[3]]
    print(f"\nload at the end {os.getloadavg()[0]:.1f}; worse: {', '.join(worse) or 'none'}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
