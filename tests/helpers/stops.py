"""A writer that is stopped at each of its file operations in turn, as a killed process would be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flix.core import folders

OPERATIONS = ("open", "replace", "rename", "unlink", "fsync", "chmod", "fchmod", "mkdir", "rmdir", "link", "symlink")  # fmt: skip


class Stopped(BaseException):
    """The writer ends here: nothing of its own goes on."""


@contextmanager
def stopping(at: int, tidy: bool) -> Iterator[list[str]]:
    """Stop at this operation; the names of those that were begun.

    Args:
        at: the operation's number, from 1.
        tidy: let the writer clean up, as after an error; otherwise no later operation does anything, as after a kill.
    """
    begun: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            begun.append(name)
            if len(begun) == at or (len(begun) > at and not tidy):
                raise Stopped(name)
            return call(*args, **kwargs)

        return operation

    exchange = folders._exchange
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        found = exchange()
        if found is not None:
            patch.setattr(folders, "_exchange", lambda: counted("exchange", found))
        yield begun


def stops(write: Callable[[], object], tidy: bool = False) -> Iterator[str | None]:
    """Run a writer again and again, stopped one operation later each time.

    Yields:
        What it was stopped at; None at last, when it ran through.
    """
    for at in range(1, 500):
        with stopping(at, tidy) as begun:
            try:
                write()
            except Stopped:
                stopped: str | None = begun[at - 1]
            else:
                stopped = None
                assert len(begun) < at, "a stop was swallowed"
        yield stopped
        if stopped is None:
            return
    raise AssertionError("it never ran through")


def leftovers(folder: Path) -> list[str]:
    """What writers left aside in a folder and beside it."""
    places = (folder, folder.parent) if folder.is_dir() else (folder.parent,)
    return [p.name for place in places for p in place.iterdir() if p.name.endswith(".part")]
