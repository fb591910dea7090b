"""Times on a CUDA device; without one, those of the host, for a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.common import Arm, interleaved

_FLUSH = 256 * 2**20  # bytes; more than any card's last cache holds
_HEAD_START = 10_000_000  # cycles in which the host gets ahead of the device


class Clock:
    """Measures on the device that there is.

    Args:
        dry: on the CPU, whatever there is.

    Attributes:
        cuda: whether a device is measured.
        device: its name for torch.
    """

    def __init__(self, dry: bool = False) -> None:
        self.cuda = torch.cuda.is_available() and not dry
        self.device = "cuda" if self.cuda else "cpu"
        size = _FLUSH if self.cuda else 1
        self._cold = torch.empty(size, dtype=torch.uint8, device=self.device)

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in the device's work; see :meth:`between`."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        """Milliseconds from one mark to another, once the device has passed both."""
        return float(first.elapsed_time(second) if self.cuda else (second - first) * 1e3)

    def cold(self, arm: Arm) -> float:
        """Milliseconds of one run on the device alone, begun with a cold cache.

        The device sleeps while the host queues the run, so that no launch is waited for.
        """
        arm.reset()
        with arm.around():
            self._cold.zero_()
            if self.cuda:
                torch.cuda._sleep(_HEAD_START)
            start = self.mark()
            held = arm.run()
            end = self.mark()
            self.sync()
        del held
        return self.between(start, end)

    def warm(self, arm: Arm, steps: int = 10) -> float:
        """Milliseconds of a run, the host's part included: several in a row, as layers follow each other in a model."""
        steps = steps if self.cuda else 1
        with arm.around():
            arm.reset()
            self.sync()
            start = time.perf_counter()
            for _ in range(steps):
                arm.reset()
                held = arm.run()
            self.sync()
            seconds = time.perf_counter() - start
        del held
        return seconds * 1e3 / steps

    def times(
        self, arms: Sequence[Arm], rounds: int, how: Callable[[Arm], float] | None = None
    ) -> dict[str, list[float]]:
        """Milliseconds of every arm in every round, in turn; on a device two rounds are thrown away first."""
        found: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for number, arm in interleaved(arms, rounds, warmup=2 if self.cuda else 0):
            ms = (how or self.cold)(arm)
            if number >= 0:
                found[arm.name].append(ms)
        return found

    def peak(self, arm: Arm) -> float | None:
        """The most MiB that a run holds above what was held before."""
        if not self.cuda:
            return None
        arm.reset()
        with arm.around():
            self.sync()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            held = arm.run()
            self.sync()
        del held
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def bandwidth(self) -> float:
        """Bytes read and written a second by a copy within the device's memory."""
        size = 2**30 if self.cuda else 2**20
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copy = Arm("copy", lambda: target.copy_(source))
        ms = min(self.cold(copy) for _ in range(5))
        return 2 * size / (ms / 1e3)


def graphed(arm: Arm, kept: ExitStack) -> Arm:
    """An arm whose runs are one CUDA graph of the given arm's.

    Args:
        arm: what is captured.
        kept: keeps in force what is around the arm: the graph reads its tensors whenever it runs.
    """
    kept.enter_context(arm.around())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            arm.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = arm.run()

    def run() -> Any:
        graph.replay()
        return out

    return Arm(arm.name, run, arm.results)
