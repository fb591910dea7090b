"""A folder that one program works in at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flix.core.errors import RunError
from flix.core.files import fcntl

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path, what: str, *, leave: bool = False) -> Iterator[None]:
    """Hold a folder, so that no other process works in it. Whatever ends this process sets the folder free.

    Args:
        folder: the folder, which exists.
        what: works in it, for messages.
        leave: whether the lock's file stays, as a mark of whose folder it is; it holds nothing then.

    Raises:
        RunError: another process does.
    """
    if fcntl is None:
        yield
        return
    handle = _locked(folder, what)
    try:
        yield
    finally:
        if not leave:
            with suppress(OSError):
                os.unlink(folder / LOCK)
        os.close(handle)


def _locked(folder: Path, what: str) -> int:
    while True:
        handle = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise RunError(f"{folder}: another {what} is working in this folder") from None
        except OSError:  # a file system without locks
            return handle
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # who held it has just removed it: another may hold a new one
