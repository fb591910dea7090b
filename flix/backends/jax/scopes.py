"""Where code runs: under which trace, and in whose ``disable`` block (docs/specification.md §5.1.3, §5.1.4).

Blocks belong to the thread or task that entered them. Compiled functions are chosen by what JAX and flax look up in
their caches, so the blocks are said there, too: a module that is flattened carries a :class:`Mark`, and for functions
that close over a module, JAX's own key holds what this thread has open (``jax.make_user_context``).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.extend.core import get_opaque_trace_state

from flix.backends.forward import Blocks, in_task
from flix.core.errors import RoutingError

MARK = "flix_mark"
"""The attribute of a module that came through a graph, with its :class:`Mark`."""


def frame() -> Any:
    """The program that is being traced, as a weak reference to its innermost trace; None where values are computed.

    What differentiates or maps (``grad``, ``vmap``) caches nothing that is traced, and so is no frame.
    """
    trace = get_opaque_trace_state()._trace_ref()  # type: ignore[no-untyped-call]
    while type(trace).__name__ != "DynamicJaxprTrace" and hasattr(trace, "parent_trace"):
        trace = trace.parent_trace
    return None if type(trace).__name__ == "EvalTrace" else weakref.ref(trace)


class Block:
    """An open ``disable``.

    Attributes:
        state: the model's ``flix_state``.
        holders: the model and its layers, which are kept alive while it is open, so that their ids are theirs.
        ids: their ids.
        task: whether an asyncio task entered it, outside of any program.
    """

    def __init__(self, state: Any, holders: Iterable[Any]) -> None:
        self.state, self.holders = state, (*holders,)
        self.ids = frozenset(map(id, self.holders))
        self.task = frame() is None and in_task()


@dataclass(frozen=True)
class Mark:
    """Whether a module was in a block when it was flattened: a static attribute, so that caches tell both apart."""

    off: bool
    blocks: tuple[Block, ...] = field(default=(), compare=False, repr=False)

    def __deepcopy__(self, memo: Any) -> Mark:
        return self


class _Key(NamedTuple):
    """What JAX's caches look up beside a function's arguments.

    Attributes:
        off: ids of the models that are disabled.
        tasks: whether tasks of this thread have blocks open, which a thread's key cannot tell apart.
        call: tells calls apart whose routing a function inside would otherwise keep.
    """

    off: frozenset[int] = frozenset()
    tasks: bool = False
    call: object = None


class _Thread(threading.local):
    """The token of the routed call that this thread runs; False outside of one."""

    def __init__(self) -> None:
        self.call: object = False


_blocks: Blocks[Block] = Blocks("flix_blocks")
_thread = _Thread()
_context = jax.make_user_context(None) if hasattr(jax, "make_user_context") else None  # type: ignore[no-untyped-call]
_inside = False  # whether a layer ever ran in a program inside of the one that its routing was put in force in


def enter(block: Block) -> None:
    """Open a block."""
    _blocks.enter(block)
    _show()


def leave(model: Any) -> None:
    """Close the last block of a model; blocks may be closed in any order."""
    for block in reversed(_blocks.task):
        if (
            block.holders[0] is model
        ):  # its state may be another since: nnx.jit gives that of an equal model
            _blocks.leave(block)
            _show()
            return


def _show() -> None:
    """Let JAX's key say what is open: in a routed call to whom it belongs, outside to this thread."""
    if _context is None:
        return
    in_call = _thread.call is not False
    off = frozenset(
        id(block.holders[0]) for block in (_blocks.task if in_call else _blocks.thread.open)
    )
    key = _Key(off, _tasks(), _thread.call if in_call else None)
    _context(None if key == _Key() else key).__enter__()


def _tasks() -> bool:
    return any(block.task for block in _blocks.thread.open)


def disabled(holder: Any) -> bool:
    """Whether a model or layer is to be its base.

    Raises:
        RoutingError: in a compiled function that cannot be told apart from one without the block.
    """
    open, mark = _blocks.task, vars(holder).get(MARK)
    if not open and mark is None and not _blocks.thread.open:
        return False
    if any(id(holder) in block.ids for block in open):
        if mark is None and frame() is not None:
            _check_key()
        return True
    if frame() is None:
        return mark is not None and any(block in mark.blocks for block in open)
    if mark is not None:
        return mark.off  # type: ignore[no-any-return]
    _check_key()
    if any(block.state is holder.flix_state for block in open):
        raise RoutingError(
            "a compiled function was given a disabled model as it was before (nnx.cached_partial, or a copy that it "
            "closes over); make the function inside disable(model), or pass it the model itself"
        )
    return False


def _check_key() -> None:
    """Refuse a function that closes over a model where JAX's key does not say whose block is open."""
    if _context is None or _tasks() or {*_blocks.task} != {*_blocks.thread.open}:
        raise RoutingError(
            "a compiled function closes over an adapted model, while a task or thread of asyncio "
            "has disable open: its cache cannot tell tasks apart; pass the model as an argument, "
            "as in nnx.jit(f)(model, x)"
        )


def mark(holder: Any) -> Mark | None:
    """The mark that a module carries into a graph; None where no block is open."""
    open, own = _blocks.task, vars(holder).get(MARK)
    if not open and own is None and not _tasks():
        return None
    off = disabled(holder)
    return Mark(off, open if off else ())


def reached_inside() -> bool:
    """Note that a layer runs inside of the program that its routing was put in force in.

    Returns:
        Whether JAX's caches can tell calls apart.
    """
    global _inside
    _inside = True
    return _context is not None


@contextmanager
def own_key() -> Iterator[None]:
    """Run a routed call, so that no function traced inside of it is taken for another call's."""
    previous = _thread.call
    # At once, a layer in a program of its own is refused; a key of its own there keeps out what others traced.
    _thread.call = None if frame() is None else object() if _inside else "traced"
    changed = _thread.call is not None or previous or _blocks.task or _blocks.thread.open
    if changed:
        _show()
    try:
        yield
    finally:
        _thread.call = previous
        if changed:
            _show()
