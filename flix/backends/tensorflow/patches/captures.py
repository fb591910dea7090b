"""Inputs of a ``tf.function`` that are looked up anew at each of its calls.

A traced function keeps what Python held while it was traced; what must belong to the call has to be an input of it.
TensorFlow has such inputs, "deferred captures", for its own use.

What: an entry in the table of captures of the graph that is being traced, and its class, for checks at its calls. When:
an adapted layer or model is traced. Undone: it goes with the traced function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.core.function import trace_type
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph


def traced_function() -> Any:
    """The graph of the function that is being traced; None in eager mode. Loops and branches are part of it."""
    if tf.executing_eagerly():
        return None
    graph = tf.compat.v1.get_default_graph()
    while isinstance(graph, ControlFlowFuncGraph):
        graph = graph.outer_graph
    return graph


def in_branch() -> bool:
    """Whether a loop or branch is being traced, or a function inside of one."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None and not isinstance(graph, ControlFlowFuncGraph):
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def late(graph: Any, key: str, look_up: Callable[[], Any], spec: Any) -> Any:
    """What stands in a graph for a value that is looked up at each call.

    Args:
        graph: of :func:`traced_function`.
        key: calls with the same key give the same tensors.
        look_up: gives the value where the function is called, eagerly or while another function is traced. What it
            raises, the call raises.
        spec: ``tf.TensorSpec``, or a tuple of them.
    """
    if not isinstance(graph, FuncGraph):
        return look_up()
    captures = graph.function_captures
    if key not in captures.by_ref_internal:
        kind = trace_type.from_value(spec, trace_type.InternalTracingContext(True))
        inside = kind.placeholder_value(trace_type.InternalPlaceholderContext(graph))

        def value() -> Any:
            return kind.to_tensors(kind.cast(look_up(), trace_type.InternalCastContext()))

        value.output_spec = kind  # type: ignore[attr-defined]
        captures.add_or_replace(
            key=key, external=value, internal=inside, tracetype=kind, is_by_ref=True
        )
    return captures.by_ref_internal[key]


class Checked(FuncGraph):  # type: ignore[misc]
    """A graph whose function makes checks at each call; they stand among its deferred captures and give no tensor."""

    @property
    def deferred_external_captures(self) -> list[Any]:
        """TensorFlow's hook; what is callable here is called at each call."""
        return [*super().deferred_external_captures, *kept(self)["checks"].values()]


def at_calls(graph: Any, key: Any, check: Callable[[], None]) -> None:
    """Have something checked at each call of the function that is being traced; one check a key."""
    if type(graph) is FuncGraph:
        graph.__class__ = Checked
    if isinstance(graph, Checked):

        def checked() -> tuple[()]:
            check()
            return ()

        kept(graph).setdefault("checks", {}).setdefault(key, checked)


def kept(graph: Any) -> dict[Any, Any]:
    """What flix keeps with a graph."""
    if not hasattr(graph, "flix_kept"):
        graph.flix_kept = {}
    return graph.flix_kept  # type: ignore[no-any-return]
