"""Many requests at once, for any backend: which were right, and how memory grew."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flix

FEATURES, WORKERS = 16, 8
REGISTRY = flix.FeatureRegistry({"language": [f"l{i}" for i in range(FEATURES)]})
CALLS = [1000, pytest.param(10_000, marks=pytest.mark.slow)]
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


def answers(ask: Callable[[tuple[int, int]], Any]) -> dict[Any, Any]:
    """What ``ask`` gives, one call after the other, for a feature in each of two rows; under None, for none in both."""
    pairs = [(a, b) for a in range(FEATURES) for b in range(FEATURES)]
    return {p: np.asarray(ask(p)) for p in pairs} | {None: np.asarray(ask((-1, -1)))}


def pair_of(worker: int, call: int) -> tuple[int, int]:
    """The features of two rows, others for every worker and call."""
    return (worker * 7 + call) % FEATURES, (worker * 5 + 3 * call) % FEATURES


def in_threads(calls: int, ask: Callable[[int, int], bool]) -> Counter[str]:
    """So many calls of ``ask(worker, call)`` from eight threads: "right", "wrong", and errors by text."""
    counts = [Counter[str]() for _ in range(WORKERS)]

    def serve(worker: int) -> None:
        for call in range(calls // WORKERS):
            counts[worker][_found(ask, worker, call)] += 1

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts, Counter())


def in_tasks(
    calls: int, block: Callable[[int, int], Any], ask: Callable[[int, int], bool]
) -> Counter[str]:
    """The same from eight asyncio tasks, each of which holds ``block(worker, call)`` open while the others run."""
    counts = Counter[str]()

    async def serve(worker: int) -> None:
        for call in range(calls // WORKERS):
            with block(worker, call):
                await asyncio.sleep(0)
                counts[_found(ask, worker, call)] += 1
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        await asyncio.gather(*map(serve, range(WORKERS)))

    asyncio.run(all_of_them())
    return counts


def _found(ask: Callable[[int, int], bool], worker: int, call: int) -> str:
    try:
        return "right" if ask(worker, call) else "wrong"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check_memory(
    record: Callable[[str, object], None], warm: Callable[[], object], work: Callable[[], object]
) -> None:
    """Memory stays, within 2 %, over some work; how much it grew is recorded, for ``python -m torture``.

    Args:
        record: pytest's ``record_property``.
        warm: what makes everything that is kept.
        work: what must keep nothing more.
    """
    warm()
    before = resident()
    work()
    growth = 100 * (resident() / before - 1)
    record("growth", f"{growth:.2f}")
    assert growth < 2


def resident() -> int:
    """The process's resident memory, in bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
