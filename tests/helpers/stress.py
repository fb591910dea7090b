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

import pytest

WORKERS = 8
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


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


def resident() -> int:
    """The process's resident memory, in bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
