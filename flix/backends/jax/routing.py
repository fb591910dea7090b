"""Routing as JAX sees it: checked on the host where its values are known, by shape and dtype where they are traced."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flix.backends import messages
from flix.core.errors import RoutingError
from flix.core.features.registry import FeatureRegistry
from flix.core.features.routing import Routing, check_routing
from flix.core.strategy.union import first_unlike


@dataclass(frozen=True)
class ActiveRouting:
    """Checked routing of one forward.

    Attributes:
        ids: int32 ``[W]``, ``[B, W]`` or ``[B, T, W]``.
        weights: floats in that shape, or None for 1.
        present: the features whose rows the layers hold, where they were gathered; else None.
        unlike: where the ids are known, the first row that differs from row 0.
        mapped: whether ``vmap`` took an axis off the ids.
    """

    ids: Array
    weights: Array | None
    present: Array | None = None
    unlike: int | None = None
    mapped: bool = False


class _Current(threading.local):
    routing: ActiveRouting | None = None
    present: Array | None = None


current = _Current()


def is_traced(value: Any) -> bool:
    """Whether a value is known only when the compiled function runs."""
    return isinstance(value, jax.core.Tracer)


def make_routing(
    registry: FeatureRegistry, features: Any, weights: Any = None, *, present: Array | None = None
) -> ActiveRouting:
    """Check routing and make it ready for a forward.

    Known ids are checked in full. Of traced ids the shape and dtype are checked; a traced id of no feature gives
    NaN in its row.

    Args:
        registry: the registry that the ids belong to.
        features: ids as an array or nested list, ``[B, W]`` or ``[B, T, W]``, or a :class:`flix.Routing`; traced ids
            may be ``[W]``, one composition for all, as ``vmap`` over rows sees them.
        weights: floats in the shape of the ids, or None.
        present: the features whose rows the layers hold, or None.

    Raises:
        RoutingError: routing that breaks a rule; the row is named where it is known.
    """
    if isinstance(features, Routing):
        if features.registry != registry:
            raise messages.other_registry(features.registry, registry)
        weights = features.weights if weights is None else weights
        features = features.ids
    ids = _as_array(features, "flix_features")
    floats = None if weights is None else _as_array(weights, "flix_weights")
    unlike = None
    if is_traced(ids):
        _check_traced(ids, floats)
    else:
        host = np.asarray(ids)
        on_host = None
        if floats is not None and not is_traced(floats):
            on_host = np.asarray(floats)
            if on_host.dtype.kind == "V":  # bfloat16
                on_host = on_host.astype(np.float32)
        check_routing(host, on_host, registry)
        if floats is not None and on_host is None:
            _check_traced(ids, floats)
        rows = host.reshape(-1, host.shape[-1])
        unlike = first_unlike(rows, None if on_host is None else on_host.reshape(rows.shape))
        ids = host
    return ActiveRouting(
        jnp.asarray(ids).astype(jnp.int32),
        None if floats is None else jnp.asarray(floats),
        present,
        unlike,
        type(features).__name__ == "BatchTracer",
    )


def _as_array(value: Any, what: str) -> Any:
    if isinstance(value, jax.Array | np.ndarray):
        return value
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise messages.no_array(what, value) from error


def _check_traced(ids: Any, weights: Any) -> None:
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise messages.ids_not_integer(ids.dtype)
    if ids.ndim not in (1, 2, 3):
        raise messages.ids_shape(ids.shape)
    if weights is None:
        return
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise messages.weights_not_float(weights.dtype)
    if weights.shape != ids.shape:
        raise messages.weights_shape(weights.shape, ids.shape)


def leading_shape(
    x: Array, routing: ActiveRouting, trailing: int, path: str
) -> tuple[tuple[int, ...], int, int]:
    """The leading shape that a layer's output gets, as the routing's rows N and the positions S that share one.

    Args:
        x: ``[..., d_in]`` (trailing 1), or token ids ``[...]`` (trailing 0).
        routing: the routing in force.
        trailing: the number of dimensions of x that are not positions.
        path: the layer's, for the message.

    Returns:
        The leading shape, N and S. The shape differs from x's where x has one row for a whole batch.

    Raises:
        RoutingError: the leading dimensions are not the routing's.
    """
    lead = tuple(routing.ids.shape[:-1])  # of what is routed: (), [B] or [B, T]
    given = tuple(x.shape[: x.ndim - trailing])
    if not lead and not routing.mapped and (len(given) > 1 or given == tuple(routing.ids.shape)):
        # One feature a row, given as [batch], must not become all features for every row.
        raise RoutingError(
            f"layer {path!r}: ids {list(routing.ids.shape)} mean one composition for all of an input of "
            f"leading shape {list(given)}, as vmap over rows sees it; ids of a batch are [batch, width] "
            "(under vmap, give x[None] and ids[None] if this is meant)"
        )
    if given[: len(lead)] != lead:
        single = isinstance(lead[0], int) and lead[0] <= 1  # a symbolic size (jax.export) is any
        if given[:1] != (1,) or given[1 : len(lead)] != lead[1:] or single:
            raise messages.other_lead(path, given, lead)
        # One row for all, as position ids have it: each row of the batch gets its own.
        given = (*lead, *given[len(lead) :])
    return given, math.prod(lead), math.prod(given[len(lead) :])


@contextmanager
def in_force(**values: Any) -> Iterator[None]:
    """Run with a ``routing`` in force on this thread, or with layers that hold the rows of the ``present`` features."""
    previous = {name: getattr(current, name) for name in values}
    vars(current).update(values)
    try:
        yield
    finally:
        vars(current).update(previous)


@contextmanager
def route(registry: FeatureRegistry, features: Any, weights: Any = None) -> Iterator[None]:
    """Run an adapted model's methods other than its call (``model.encode(x)``) under one routing.

    Args:
        registry: the model's registry.
        features: int ``[B, W]`` or ``[B, T, W]``.
        weights: float in that shape, or None for 1.

    Raises:
        RoutingError: routing that breaks a rule.
    """
    routing = make_routing(registry, features, weights, present=current.present)
    with in_force(routing=routing):
        yield
