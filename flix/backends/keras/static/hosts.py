"""What only the framework below Keras can say: what is traced, in which program, and what a call reads.

JAX compiles functions and keeps them by their arguments; what Python held while they were traced is baked in. Its own
key of what else they are kept by holds which models are off (``jax.make_user_context``, where JAX has it), so that a
function that was compiled outside of ``disable`` is not taken for one inside. torch runs what it is given.
"""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
from keras import KerasTensor, ops, tree
from keras.src.backend.common.stateless_scope import get_stateless_scope

from flix.backends.forward import in_task
from flix.core.errors import RoutingError

JAX = keras.backend.backend() == "jax"
host: Any = importlib.import_module("jax" if JAX else "torch")


def frame() -> Any:
    """The program that is being traced, as a weak reference to its innermost trace; None where values are computed.

    What differentiates or maps (``grad``, ``vmap``) caches nothing that is traced, and so is no frame.
    """
    if not JAX:
        return None
    core = importlib.import_module("jax.extend.core")
    trace = core.get_opaque_trace_state()._trace_ref()
    while type(trace).__name__ != "DynamicJaxprTrace" and hasattr(trace, "parent_trace"):
        trace = trace.parent_trace
    return None if type(trace).__name__ == "EvalTrace" else weakref.ref(trace)


def known(value: Any) -> bool:
    """Whether a tensor's values are at hand, or are known only when a compiled function runs."""
    if isinstance(value, KerasTensor):
        return False
    if JAX:
        return not isinstance(value, host.core.Tracer)
    return not (isinstance(value, host.Tensor) and value.device.type == "meta")


@contextmanager
def kept(model: Any) -> Iterator[None]:
    """Give a model its variables back where ``fit``, ``predict`` or the like fails: Keras on JAX takes them meanwhile.

    They are those after the last whole step, or those from before; what JAX was running a step with is lost.
    """
    if not JAX:
        yield
        return
    if getattr(model, "_jax_state_synced", True):
        model._jax_state = None  # of an earlier call
    before = [(v, v._value) for variables in _groups(model).values() for v in variables]
    try:
        yield
    except BaseException:
        state = getattr(model, "_jax_state", None) or {}
        groups = _groups(model).items()
        after = [p for name, own in groups for p in zip(own, state.get(name) or ())]  # noqa: B905
        for variable, value in (*after, *before):
            if variable._value is None and value is not None and not value.is_deleted():
                variable._value = value
        model._jax_state_synced = True
        raise


def _groups(model: Any) -> dict[str, Any]:
    """A model's variables as Keras on JAX keeps them while it runs; one that was not compiled has no optimizer."""
    names = ("trainable_variables", "non_trainable_variables", "metrics_variables")
    optimizer = getattr(model, "optimizer", None)
    return {
        **{name: getattr(model, name) for name in names},
        "optimizer_variables": getattr(optimizer, "variables", ()),
    }


class _Thread(threading.local):
    """What this thread has JAX keep functions by: models that are off, and how often models changed."""

    def __init__(self) -> None:
        self.off: tuple[Any, ...] = ()
        self.changes = 0


_thread = _Thread()
_make: Any = getattr(host, "make_user_context", None) if JAX else None
_context: Any = None if _make is None else _make(None)


def _show() -> None:
    if _context is not None:
        off = frozenset(map(id, _thread.off))
        key = (off, _thread.changes) if off or _thread.changes else None
        _context(key).__enter__()


def switched(state: Any, by: int) -> None:
    """Note that a ``disable`` block opens (1) or closes (-1).

    Raises:
        RoutingError: an asyncio task of JAX's, whose compiled functions cannot tell tasks apart.
    """
    if not JAX:
        return
    if by > 0:
        if in_task():
            raise RoutingError(
                "disable was entered by an asyncio task: functions that JAX compiled cannot tell the tasks of a thread "
                "apart; enter it in a thread of its own (asyncio.to_thread), or give ids of -1"
            )
        _thread.off = (*_thread.off, state)
    else:
        held = [*_thread.off]
        for place in reversed(range(len(held))):
            if held[place] is state:
                del held[place]
                break
        _thread.off = tuple(held)
    _show()


def changed() -> None:
    """Let functions that this thread's JAX compiled be compiled anew: features joined or left, froze or thawed."""
    _thread.changes += 1
    _show()


def reads(run: Callable[[], Any], kernels: Mapping[str, Any]) -> set[str]:
    """Which of some variables a call reads the values of; a look at a shape or dtype is none.

    JAX traces the call once more and looks which values the program uses; torch runs it and looks where gradients go.
    """
    paths, variables = [*kernels], [*kernels.values()]

    outer = get_stateless_scope()  # where Keras's own functions have the values of all others

    def outputs(values: Any) -> list[Any]:
        with keras.StatelessScope(state_mapping=[*zip(variables, values, strict=True)]) as scope:
            if outer is not None:
                scope.state_mapping = {**outer.state_mapping, **scope.state_mapping}
            return [y for y in tree.flatten(run()) if ops.is_tensor(y)]

    values = [variable.value for variable in variables]
    if JAX:
        program = host.make_jaxpr(outputs)(values).jaxpr
        used = {id(x) for equation in program.eqns for x in equation.invars}
        used |= {id(x) for x in program.outvars}
        return {path for path, x in zip(paths, program.invars, strict=True) if id(x) in used}
    found = {path for path, x in zip(paths, values, strict=True) if not x.is_floating_point()}
    with host.enable_grad():
        given = [x.detach().clone() for x in values]
        asked = [x.requires_grad_() for x in given if x.is_floating_point()]
        total = sum(y.sum() for y in outputs(given) if y.requires_grad)
        if asked and ops.is_tensor(total):
            grads = host.autograd.grad(total, asked, allow_unused=True)
            floating = [path for path in paths if path not in found]
            found |= {p for p, grad in zip(floating, grads, strict=True) if grad is not None}
    return found


def slope(function: Callable[[Any], Any], at: Any) -> tuple[Any, Any]:
    """A scalar function's value at a point, and its gradient there."""
    point = ops.convert_to_tensor(at)
    if JAX:
        return host.value_and_grad(function)(point)  # type: ignore[no-any-return]
    with host.enable_grad():
        point = point.detach().clone().requires_grad_()
        value = function(point)
        (found,) = host.autograd.grad(value, point, allow_unused=True)
    return value.detach(), host.zeros_like(point) if found is None else found
