"""What ``routed`` and ``disable`` put in force, for the task that entered them (docs/specification.md §5.1.3).

A context variable holds it, so that asyncio tasks see their own, and so do the threads that asyncio starts for them.
Compilers cannot trace context variables: for compiled code a thread-local says the same. It cannot tell the tasks of
one thread apart, so compiled code refuses to go by it while a block that was entered inside a task is open.
"""

from __future__ import annotations

from typing import Any

import torch

from flix.backends.forward import Blocks, in_task
from flix.core.errors import RoutingError

OFF = "off"
"""The base alone."""


class Entry:
    """One open block.

    Attributes:
        state: what it concerns: the model's, or a layer's that is used by hand.
        value: :data:`OFF`, or the composition for all rows.
        task: whether an asyncio task entered it.
    """

    __slots__ = ("state", "task", "value")

    def __init__(self, state: Any, value: Any) -> None:
        self.state, self.value, self.task = state, value, in_task()


_blocks: Blocks[Entry] = Blocks("flix_entries")


def enter(state: Any, value: Any) -> Entry:
    """Open a block."""
    entry = Entry(state, value)
    _blocks.enter(entry)
    return entry


leave = _blocks.leave


def switch(state: Any, by: int) -> None:
    """Open a block of the base alone (1), or close the last one (-1)."""
    if by > 0:
        enter(state, OFF)
        return
    for entry in reversed(_blocks.task):
        if entry.state is state and entry.value is OFF:
            leave(entry)
            return


def in_force(state: Any) -> Any:
    """:data:`OFF` in any block of the base alone, else the innermost composition for all rows, else None.

    Raises:
        RoutingError: in compiled code, where tasks share a thread.
    """
    if torch.compiler.is_compiling():
        entries = _blocks.thread.open
        for entry in entries:
            if entry.task:
                raise RoutingError(
                    "compiled code cannot tell asyncio's tasks apart, and one of them has a routed or disable block "
                    "open; pass flix_features to the compiled model, or call the model uncompiled"
                )
    else:
        entries = _blocks.task
    found = None
    for entry in entries:
        if entry.state is state:
            if entry.value is OFF:
                return OFF
            found = entry.value
    return found
