"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Union

Path_ = Union[str, "os.PathLike[str]"]
"""A path as users give it."""

Content = Union[bytes, Callable[[BinaryIO], None]]
"""What a file shall hold, or what writes it into the file, which is open and unbuffered."""


def write_file(path: Path, data: bytes) -> None:
    """Write a file aside, sync it and move it into place: a reader sees the old one or the new one, whole."""
    write_files(path.parent, {path.name: data})


def write_files(folder: Path, files: Mapping[str, Content]) -> None:
    """Write several files of a folder, in order: nothing is moved into place before all are written and synced."""
    written: dict[str, Path] = {}
    try:
        for name, content in files.items():
            written[_write_aside(folder, name, content)] = folder / name
        for aside, final in list(written.items()):
            os.replace(aside, final)
            del written[aside]
    finally:
        for aside in written:  # after an error
            os.unlink(aside)


def _write_aside(folder: Path, name: str, content: Content) -> str:
    """Write and sync a file under another name in its folder; the path to move into place."""
    handle, aside = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    try:
        with os.fdopen(handle, "wb", 0 if callable(content) else -1) as file:
            if callable(content):
                content(file)  # type: ignore[arg-type]
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
    except BaseException:
        os.unlink(aside)
        raise
    return aside
