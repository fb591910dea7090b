"""Measuring what the strategies cost on a machine, for the planner. Knows no framework: a backend lends the layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from flix.core.config.config import FlixConfig
from flix.core.config.ranks import uniform
from flix.core.features.registry import FeatureRegistry
from flix.core.strategy.decide import PLANNED, Calibration, Facts, fit

RANK, WIDTH = 8, 2

Run = Callable[[], None]
Make = Callable[[FlixConfig, Facts, NDArray[np.int32], str | None], Run]
"""A backend's part: forward and backward (to the input and the features) of one layer, ready to be timed.

Given the configuration, the facts, ids ``[N, W]`` and the strategy, or None for the frozen layer alone. What it returns
blocks until the result is there.
"""


def grid(device: str, small: bool = False) -> Iterator[tuple[Facts, FlixConfig, NDArray[np.int32]]]:
    """The shapes that are measured: sizes, batches, positions and unions around where the strategies cross.

    Args:
        device: the class of devices.
        small: a few shapes only.
    """
    sizes, batches = ((64,), (1, 8)) if small else ((256, 768), (1, 8, 32))
    rng = np.random.default_rng(0)
    for d in sizes:
        for examples in batches:
            for tokens in (1, 4) if small else (1, 4, 16, 64):
                for count in (3, 25):
                    registry = FeatureRegistry({"feature": [str(i) for i in range(count)]})
                    config = FlixConfig(registry=registry, ranks=uniform(RANK))
                    drawn = [rng.choice(count, WIDTH, replace=False) for _ in range(examples)]
                    ids = np.asarray(drawn, np.int32)
                    union = RANK * len(np.unique(ids))
                    yield Facts(examples, tokens, RANK * WIDTH, union, d, d, device), config, ids


def measure(run: Run, frozen: Run, rounds: int) -> float:
    """Seconds that a layer takes above the frozen one: the median over rounds in which both run, in turn."""
    run()
    frozen()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        middle = time.perf_counter()
        frozen()
        found.append((middle - start) - (time.perf_counter() - middle))
    return statistics.median(found)


def calibrate(
    device: str,
    make: Make,
    *,
    measured: str = "",
    rounds: int = 9,
    small: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure a class of devices.

    Args:
        device: its name.
        make: a backend's layers.
        measured: when and on what, in words.
        rounds: measurements of each shape and strategy.
        small: measure a few small shapes only, to try it out.
        progress: called with (done, total).

    Raises:
        ConfigError: too few measurements came out above zero.
    """
    shapes = list(grid(device, small))
    samples = []
    for done, (facts, config, ids) in enumerate(shapes):
        frozen = make(config, facts, ids, None)
        for strategy in PLANNED:
            # One composition for all, where single is to be had.
            own = ids[:1].repeat(facts.examples, 0) if strategy == "single" else ids
            run = make(config, facts, own, strategy)
            samples.append((facts, strategy, measure(run, frozen, rounds)))
        if progress is not None:
            progress(done + 1, len(shapes))
    return fit(device, samples, measured)
