"""What a forward runs under: a model's call puts it in force, its layers read it (docs/specification.md §5.1.4).

A context variable holds what is open, so that threads and asyncio tasks see their own. Blocks may nest, overlap, and
close in any order: each takes away itself alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from flix.core.features.registry import FeatureRegistry

B = TypeVar("B")


class _Thread(threading.local):
    def __init__(self) -> None:
        self.open: tuple[Any, ...] = ()


class Blocks(Generic[B]):
    """Open blocks, in the order in which they were entered; they may be closed in any order.

    Attributes:
        thread: its ``open`` are all blocks that this thread entered, whichever of its tasks: what compilers and their
            caches can see, which know nothing of context variables.
    """

    def __init__(self, name: str) -> None:
        self._task: ContextVar[tuple[B, ...]] = ContextVar(name, default=())
        self.thread = _Thread()

    @property
    def task(self) -> tuple[B, ...]:
        """Those that this thread, or this asyncio task, entered or was started in."""
        return self._task.get()

    def enter(self, block: B) -> None:
        """Open a block."""
        self._task.set((*self._task.get(), block))
        self.thread.open = (*self.thread.open, block)

    def leave(self, block: B) -> None:
        """Close a block."""
        self._task.set(without(block, self._task.get()))
        self.thread.open = without(block, self.thread.open)


def without(block: B, blocks: tuple[B, ...]) -> tuple[B, ...]:
    """Blocks but this one, by identity."""
    return tuple(other for other in blocks if other is not block)


def in_task() -> bool:
    """Whether an asyncio task runs this."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


Values = tuple[dict[str, Any], ...]


class Forward:
    """What is in force on this thread, or in this asyncio task."""

    def __init__(self) -> None:
        self._open: ContextVar[Values] = ContextVar("flix_forward", default=())

    @property
    def routing(self) -> Any:
        """The routing in force, in the framework's own form; None outside a forward."""
        return self.innermost("routing")

    @property
    def present(self) -> Any:
        """JAX: the features whose rows the layers hold, where they were gathered; else None."""
        return self.innermost("present")

    @property
    def blocks(self) -> Values:
        """All that is open; for :meth:`resumed`."""
        return self._open.get()

    def is_off(self, state: Any) -> bool:
        """Whether a ``disable`` block holds what this object stands for, compared by identity."""
        return any(block.get("off") is state for block in self._open.get())

    @contextmanager
    def under(self, **values: Any) -> Iterator[None]:
        """Run with these values in force."""
        self._open.set((*self._open.get(), values))
        try:
            yield
        finally:
            self._close(values)

    @contextmanager
    def resumed(self, blocks: Values) -> Iterator[None]:
        """Run with exactly these in force, as they were when something was put off."""
        before = self._open.get()
        self._open.set(blocks)
        try:
            yield
        finally:
            self._open.set(before)

    def switch(self, state: Any, by: int, **also: Any) -> None:
        """Open a ``disable`` block of what this object stands for (1), or close its last one (-1).

        ``also`` is what the block holds beside.
        """
        if by > 0:
            self._open.set((*self._open.get(), {"off": state, **also}))
            return
        for block in reversed(self._open.get()):
            if block.get("off") is state:
                self._close(block)
                return

    def innermost(self, name: str) -> Any:
        """A value of the block that was opened last among those that have it; else None."""
        for block in reversed(self._open.get()):
            if name in block:
                return block[name]
        return None

    def _close(self, block: dict[str, Any]) -> None:
        self._open.set(without(block, self._open.get()))


def by_hand(
    current: Forward, make: Callable[[FeatureRegistry, Any, Any], Any]
) -> Callable[..., AbstractContextManager[None]]:
    """A backend's ``route``, from its own checks of routing."""

    @contextmanager
    def route(registry: FeatureRegistry, features: Any, weights: Any = None) -> Iterator[None]:
        """Use one routing for methods of an adapted model other than its call, or for adapted layers by hand.

        It holds for the thread or asyncio task that entered it.

        Args:
            registry: the registry of the model or the layers.
            features: int ``[B, W]`` or ``[B, T, W]``.
            weights: float in that shape, or None for 1.

        Raises:
            RoutingError: routing that breaks a rule.
        """
        with current.under(routing=make(registry, features, weights)):
            yield

    return route
