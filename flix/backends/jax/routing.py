"""Routing as JAX sees it: checked on the host where its values are known, by shape and dtype where they are traced."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flix.backends import messages
from flix.backends.forward import Forward, by_hand
from flix.backends.jax import scopes
from flix.core.errors import RoutingError
from flix.core.features.registry import FeatureRegistry
from flix.core.features.routing import as_array, check_form, check_routing, fits, unpacked
from flix.core.strategy.union import first_unlike

CALL = "model(x, flix_features=ids)"
"""How an adapted model is called; for messages."""
CARRIED = "flix_carried"
"""The attribute of a module that came through a graph in a forward, with its :class:`ActiveRouting`."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "weights", "present"],
    meta_fields=["registry", "spread"],
    drop_fields=["unlike", "frame"],
)
@dataclass(frozen=True)
class ActiveRouting:
    """Checked routing of one forward.

    Attributes:
        ids: int32 ``[W]``, ``[B, W]`` or ``[B, T, W]``; None where only ``present`` is in force.
        weights: floats in that shape, or None for 1.
        present: the features whose rows the layers hold, where they were gathered; else None.
        registry: what the ids belong to.
        unlike: where the ids are known, the first row (by token, and position) that differs from the first.
        frame: the program that it was put in force in, see :func:`flix.backends.jax.scopes.frame`.
        spread: of what was repeated along axes in front (:func:`spread`), the dimensions of the ids without them.
    """

    ids: Any
    weights: Array | None = None
    present: Array | None = None
    registry: FeatureRegistry | None = None
    unlike: tuple[int, ...] | None = None
    frame: Any = field(default_factory=scopes.frame)
    spread: int | None = None

    @property
    def mapped(self) -> bool:
        """Whether ``vmap`` took an axis off the ids."""
        return type(self.ids).__name__ == "BatchTracer"


class _Forward(Forward):
    """The forward that is running; functions that are traced in it are its own."""

    @contextmanager
    def under(self, **values: Any) -> Iterator[None]:
        with super().under(**values), scopes.own_key():
            yield


current = _Forward()


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
    features, weights = unpacked(registry, features, weights)
    ids = _as_array("flix_features", features)
    floats = None if weights is None else _as_array("flix_weights", weights)
    check_form(ids, floats, dims=(1, 2, 3) if is_traced(ids) else (2, 3))
    unlike = None
    if not is_traced(ids):
        ids = np.asarray(ids)
        on_host = None if floats is None or is_traced(floats) else np.asarray(floats)
        check_routing(ids, on_host, registry)
        unlike = first_unlike(ids, on_host)
        if on_host is not None:
            ids = np.where(on_host == 0, -1, ids)  # absent, whatever its values are
    floats = None if floats is None else jnp.asarray(floats)
    return ActiveRouting(jnp.asarray(ids).astype(jnp.int32), floats, present, registry, unlike)


def _as_array(what: str, value: Any) -> Any:
    return value if isinstance(value, jax.Array | np.ndarray) else as_array(what, value)


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
    if not (ways := fits(given, lead)):
        raise messages.other_lead(path, given, lead)
    if "one" in ways:  # each row of the batch gets its own
        given = (*lead, *given[len(lead) :])
    return given, math.prod(lead), math.prod(given[len(lead) :])


def in_force(holder: Any, path: str) -> ActiveRouting | None:
    """The routing that a model or layer runs under, if any, with the features that its tables hold.

    Put in force in the program that is running it counts. From around that program, it counts as the module carried
    it in, or else where no cache of JAX's can keep it.

    Args:
        holder: the module.
        path: the layer's, for the message.

    Raises:
        RoutingError: a cache would keep the routing of this call.
    """
    own, here = carried(holder), scopes.frame()
    around = _around()
    if own is not None or around is None:
        return None if own is None else bare(own)
    brought = vars(holder).get(CARRIED) if here is not None else None
    sure = brought is None or brought.frame == around.frame
    if sure and around.frame is not None and scopes.reached_inside():
        return around
    raise messages.kept_by_a_cache(path, CALL)


def spread(routing: ActiveRouting, lead: tuple[int, ...]) -> ActiveRouting:
    """Routing repeated along axes in front, as layers that are stacked carry it: ``scan`` and ``vmap`` take axes off.

    Args:
        routing: what is in force.
        lead: the sizes of the axes that the layers' tables have in front.
    """
    routing = bare(routing)
    if not lead:
        return routing
    found: dict[str, Any] = {
        name: None if value is None else jnp.broadcast_to(value, (*lead, *value.shape))
        for name, value in _arrays(routing).items()
    }
    return replace(routing, **found, spread=0 if routing.ids is None else routing.ids.ndim)


def bare(routing: ActiveRouting) -> ActiveRouting:
    """Routing without the axes that :func:`spread` put in front and nobody has taken off: all entries are alike."""
    if routing.spread is None:
        return routing
    own = {"ids": routing.spread, "weights": routing.spread, "present": 1}
    found: dict[str, Any] = {
        name: None if value is None else value[(0,) * (value.ndim - own[name])]
        for name, value in _arrays(routing).items()
    }
    return replace(routing, **found, spread=None)


def _arrays(routing: ActiveRouting) -> dict[str, Any]:
    return {"ids": routing.ids, "weights": routing.weights, "present": routing.present}


def carried(holder: Any) -> ActiveRouting | None:
    """What is in force in this program, or was brought into it by the module: what a graph carries on."""
    around, here = _around(), scopes.frame()
    if around is not None and around.frame == here:
        return around
    # At once, what a module brought is a copy's from a forward: that is over, or another's.
    brought: ActiveRouting | None = vars(holder).get(CARRIED) if here is not None else None
    if brought is not None and (around is None or around.frame is None or brought.frame == here):
        return brought
    return None


def _around() -> ActiveRouting | None:
    return current.routing if current.routing is not None else current.present  # type: ignore[no-any-return]


def present_of(holder: Any, path: str) -> Array | None:
    """The features whose rows a module's tables hold, where they were gathered; else None."""
    if current.present is None and CARRIED not in vars(holder):
        return None
    found = in_force(holder, path)
    return None if found is None else found.present


def _by_hand(registry: FeatureRegistry, features: Any, weights: Any) -> ActiveRouting:
    around = current.present
    if around is not None and around.frame != scopes.frame():
        raise messages.kept_by_a_cache("route", CALL)
    return make_routing(registry, features, weights, present=around and around.present)


route: Final = by_hand(current, _by_hand)
