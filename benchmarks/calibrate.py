"""Positions a row from which gather is faster than masked, on this machine: an entry of flix/core/strategy/table.json.

Method: for unions of several ratios (slots of the batch over those of one example) and several positions a row,
the time of gather over that of masked, forward and backward, by the layer benchmarks (results are held to the
definition first). For each ratio the start of gather is the one that loses least time over all measurements of that
ratio. Single is timed for one example, where it is always taken.

    python -m benchmarks.calibrate [--framework torch] [--rounds 9] [--json FILE] [--smoke]

Whoever puts an entry in the table has measured it on a quiet machine; the package reads no table but its own.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.layer.problem import ACTIVE, make_problem

FRAMEWORKS = {
    "torch": "benchmarks.layer.torch_layer",
    "jax": "benchmarks.layer.jax_layer",
    "tensorflow": "benchmarks.layer.tensorflow_layer",
}
FEATURES = (3, 4, 6, 8, 12, 16, 24, 32, 48)
POSITIONS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)


class Sample(NamedTuple):
    """One measurement: the union's ratio, positions a row, and gather's time over masked's."""

    ratio: float
    positions: int
    times: float


def samples(
    over_masked: Callable[..., float], rounds: int, small: bool = False
) -> Iterable[Sample]:
    """Measurements over sizes, ratios and positions."""
    sizes, features, positions = (256, 768), FEATURES, POSITIONS
    if small:
        sizes, features, positions = (32,), (3, 8), (1, 4)
    for d in sizes:
        for count in features:
            for length in positions:
                problem = make_problem(d, max(32, count), length, count, drawn=count)
                ratio = len(problem.pairs) / ACTIVE
                yield Sample(ratio, length, over_masked("gather", problem, rounds))


def steps(found: Iterable[Sample]) -> list[tuple[float, int]]:
    """``gather_from`` of the table: where each ratio's start, which never rises with the ratio, is new."""
    by_ratio: dict[float, list[Sample]] = {}
    for sample in found:
        by_ratio.setdefault(sample.ratio, []).append(sample)
    made: list[tuple[float, int]] = []
    for ratio, own in sorted(by_ratio.items()):
        starts: list[float] = [*sorted({sample.positions for sample in own}), math.inf]
        best = min(starts, key=lambda start: _lost(own, start))
        if best < (made[-1][1] if made else math.inf):
            made.append((ratio, int(best)))
    return made


def _lost(own: list[Sample], start: float) -> float:
    """Logarithms of the time lost where gather is taken from ``start`` positions on."""
    return sum(max(0.0, math.log(t) if s >= start else -math.log(t)) for _, s, t in own)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try it out")
    options = parser.parse_args()
    layer = importlib.import_module(FRAMEWORKS[options.framework])
    device = f"{options.framework}-{layer.start()}"
    found = list(samples(layer.over_masked, options.rounds, options.smoke))
    single = layer.over_masked(
        "single", make_problem(32 if options.smoke else 768, 1, 16), options.rounds
    )
    print(f"one example: single takes {single:.2f} times the time of masked", file=sys.stderr)
    day = str(datetime.date.today())
    version = importlib.import_module(options.framework).__version__
    entry = {
        "measured": dict.fromkeys(("gather", "masked", "single"), day),
        "on": f"{platform.machine()} {platform.system()}, {options.framework} {version}, 1 thread",
        "gather_from": steps(found),
        "union_unknown": 8,
    }
    text = json.dumps({device: entry}, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
