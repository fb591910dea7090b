"""Writers beside a reader."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def writing(*writes: Callable[[], object]) -> Iterator[None]:
    """Threads that write over and over while the block runs; what ended one of them is raised after it."""
    ends, broken = threading.Event(), []

    def again_and_again(write: Callable[[], object]) -> None:
        try:
            while not ends.is_set():
                write()
        except BaseException as error:
            broken.append(error)

    threads = [threading.Thread(target=again_and_again, args=(write,)) for write in writes]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    for error in broken:
        raise error
