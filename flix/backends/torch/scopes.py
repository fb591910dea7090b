"""What ``routed`` and ``disable`` put in force, for the task that entered them (docs/specification.md §5.1.3).

A context variable holds it, so that asyncio tasks see their own, and so do the threads that asyncio starts for them.
Compilers cannot trace context variables: for compiled code a thread-local says the same. It cannot tell the tasks of
one thread apart, so compiled code refuses to go by it while a block that was entered inside a task is open.
"""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from typing import Any

import torch

from flix.core.errors import RoutingError

OFF = "off"
"""The base alone."""


class Entry:
    """One open block.

    Attributes:
        state: what it concerns: the model's, or a layer's that is used by hand.
        value: :data:`OFF`, or the composition for all rows.
    """

    __slots__ = ("state", "task", "value")

    def __init__(self, state: Any, value: Any, task: bool) -> None:
        self.state, self.value, self.task = state, value, task


class _Traced(threading.local):
    """What compiled code sees: this thread's open blocks, and how many of them tasks entered."""

    def __init__(self) -> None:
        self.entries: tuple[Entry, ...] = ()
        self.tasks = 0


_entries: ContextVar[tuple[Entry, ...]] = ContextVar("flix_entries", default=())
_traced = _Traced()


def enter(state: Any, value: Any) -> Entry:
    """Open a block."""
    entry = Entry(state, value, _in_task())
    _entries.set((*_entries.get(), entry))
    _traced.entries = (*_traced.entries, entry)
    _traced.tasks += entry.task
    return entry


def leave(entry: Entry) -> None:
    """Close a block; blocks may be closed in any order."""
    _entries.set(tuple(other for other in _entries.get() if other is not entry))
    kept = tuple(other for other in _traced.entries if other is not entry)
    if len(kept) < len(_traced.entries):  # not so on another thread
        _traced.entries = kept
        _traced.tasks -= entry.task


def switch(state: Any, by: int) -> None:
    """Open a block of the base alone (1), or close the last one (-1)."""
    if by > 0:
        enter(state, OFF)
        return
    for entry in reversed(_entries.get()):
        if entry.state is state and entry.value is OFF:
            leave(entry)
            return


def in_force(state: Any) -> Any:
    """:data:`OFF` in any block of the base alone, else the innermost composition for all rows, else None.

    Raises:
        RoutingError: in compiled code, where tasks share a thread.
    """
    if torch.compiler.is_compiling():
        entries = _traced.entries
        if _traced.tasks:
            raise RoutingError(
                "compiled code cannot tell asyncio's tasks apart, and one of them has a routed or disable block open; "
                "pass flix_features to the compiled model, or call the model uncompiled"
            )
    else:
        entries = _entries.get()
    found = None
    for entry in entries:
        if entry.state is state:
            if entry.value is OFF:
                return OFF
            found = entry.value
    return found


def _in_task() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
