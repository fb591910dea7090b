"""Writing files whole or not at all (docs/specification.md §4.3).

A file is written aside in its folder, synced, and moved into place by one rename, after which the folder is synced.
What a killed writer left aside is removed by the next one that writes the same file. Writers hold a lock on what they
write aside, so that none takes another's for a leftover, and none waits for another.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Union

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None

Path_ = Union[str, "os.PathLike[str]"]
"""A path as users give it."""

Content = Union[bytes, Callable[[BinaryIO], None]]
"""What a file shall hold, or what writes it into the file, which is open and unbuffered."""

# No looser form: .config.yaml.original is somebody's copy.
_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.part", re.DOTALL)


def write_file(path: Path, content: Content) -> None:
    """Write a file aside, sync it and move it into place: a reader sees the old one or the new one, whole.

    A new file has the permissions that the umask leaves, one that was there keeps its own.
    """
    sweep(path.parent, path.name)
    with _written_aside(path, content) as aside:
        os.replace(aside, path)
    sync_folder(path.parent)


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder that is there."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they outlive a crash."""
    missing = []
    at = folder
    while not at.exists():
        missing.append(at)
        at = at.parent
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's list of names, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:  # Windows; a folder that may be written and not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def sweep(folder: Path, *names: str) -> None:
    """Remove what killed writers of these files left aside in a folder; what a living writer holds stays."""
    with suppress(OSError), os.scandir(folder) as entries:
        found = [e.path for e in entries if (m := _ASIDE.fullmatch(e.name)) and m["name"] in names]
        for path in found:
            with suppress(OSError):
                _sweep(path)


def _sweep(path: str) -> None:
    if fcntl is None:
        os.unlink(path)
        return
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error: its writer lives
        os.unlink(path)
    finally:
        os.close(handle)


def aside_of(path: Path) -> Path:
    """A fresh name in a path's folder under which its next version may be made."""
    return path.parent / f".{path.name}.{secrets.token_hex(6)}.part"


def lock(handle: int) -> bool:
    """Hold what is being written aside, until its handle is closed; False if a sweep took it just before."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks, on which nothing is swept
            fcntl.flock(handle, fcntl.LOCK_EX)
    return os.fstat(handle).st_nlink > 0


@contextmanager
def _written_aside(path: Path, content: Content) -> Iterator[Path]:
    """A file beside ``path``, written and synced; it is removed again unless it was moved into place."""
    handle, aside = _opened_aside(path)
    moved = False
    try:
        with os.fdopen(handle, "wb", 0) as file:
            with suppress(OSError, AttributeError):  # none is there; a system without permissions
                os.fchmod(handle, stat.S_IMODE(os.stat(path).st_mode) & 0o777)
            if callable(content):
                content(file)  # type: ignore[arg-type]
            else:
                write_all(file, content)
            os.fsync(handle)
            if fcntl is None:
                file.close()  # Windows moves no file that is open
            yield aside
            moved = True
    finally:
        if not moved:
            with suppress(FileNotFoundError):
                os.unlink(aside)


def _opened_aside(path: Path) -> tuple[int, Path]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        aside = aside_of(path)
        handle = os.open(aside, flags, 0o666)
        if lock(handle):
            return handle, aside
        os.close(handle)
