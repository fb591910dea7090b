"""The routing of the forward that is running, and its place in a layer, on shapes that are known.

An adapted model's call puts the routing here, the adapted layers read it, each thread and asyncio task its own. What
JAX compiles takes it as an input of the model; routing from around a compiled function is refused, as JAX would keep
it for later calls. Ids that are known are checked in full. Of traced ones, those of no feature, or of a removed one,
give NaN in their rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray

from flix.backends import messages
from flix.backends.forward import Forward, by_hand
from flix.backends.keras.inputs import CALL
from flix.backends.keras.static import hosts
from flix.core.config.layout import LayerLayout
from flix.core.features.registry import FeatureRegistry
from flix.core.features.routing import as_array, check_form, check_routing, unpacked
from flix.core.strategy.union import first_unlike

current = Forward()


@dataclass(frozen=True, eq=False)
class Placed:
    """A batch's routing in one layout: R slots for each of N rows.

    Attributes:
        rows: int32 ``[N, R]``: the table row of each slot; 0, the row of zeros, where unused.
        scale: ``[N, R]``, weight times s_f, 0 where unused; it carries gradient where the weights do.
        awake: bool ``[N, R]``: the slots that are used with another weight than 0.
        total: the table's number of rows.
        bad: bool ``[N]``: rows with ids that cannot be refused any more; None where there can be none.
    """

    rows: Any
    scale: Any
    awake: Any
    total: int
    bad: Any = None

    @functools.cached_property
    def union(self) -> tuple[Any, Any]:
        """The table rows in use, ascending, filled up with row 0, int32 ``[U]``; each slot's place, ``[N, R]``."""
        flat = ops.reshape(self.rows, (-1,))
        ones = ops.ones_like(flat)
        used = ops.segment_sum(ones, flat, num_segments=self.total) > 0
        used = ops.logical_or(used, ops.arange(self.total) == 0)
        size = min(self.total, 1 + flat.shape[0])
        ordered = ops.sort(ops.where(used, ops.arange(self.total, dtype="int32"), self.total))
        union = ops.where(ordered[:size] < self.total, ordered[:size], 0)
        places = ops.take(ops.cumsum(ops.cast(used, "int32")) - 1, flat, axis=0)
        return union, ops.reshape(places, self.rows.shape)

    def _cells(self, values: Any) -> Any:
        """The sum over each row's slots, by the slots' places in the union: ``[N, U]``."""
        union, places = self.union
        count, size = self.rows.shape[0], union.shape[0]
        cells = ops.cast(ops.arange(count), "int32")[:, None] * size + ops.cast(places, "int32")
        found = ops.segment_sum(
            ops.reshape(values, (-1,)), ops.reshape(cells, (-1,)), num_segments=count * size
        )
        return ops.reshape(found, (count, size))

    @functools.cached_property
    def mask(self) -> Any:
        """Each row's factor for every row of the union: ``[N, U]``."""
        return self._cells(self.scale)

    @functools.cached_property
    def used(self) -> Any:
        """Which rows of the union each row has a slot for that is awake: bool ``[N, U]``."""
        return self._cells(ops.cast(self.awake, "int32")) > 0


@dataclass(eq=False)
class ActiveRouting:
    """Checked routing of one forward, placed once for all layers of a layout.

    Attributes:
        registry: whose ids they are.
        ids: int32 tensor ``[B, W]`` or ``[B, T, W]``.
        weights: a tensor of that shape, or None for 1.
        lengths: what may be the batch's sequence length, for layers that get flattened inputs.
        unlike: the first row (by token, and position) that differs from the first, where the values are known.
        values: the ids as numpy, where they are known; else None, and ids of the number of features stand for those
            that would have been refused.
        frame: the program in which it was made.
    """

    registry: FeatureRegistry
    ids: Any
    weights: Any
    lengths: Sequence[int] = ()
    unlike: tuple[int, ...] | None = None
    values: NDArray[np.int32] | None = None
    frame: Any = field(default_factory=hosts.frame)
    _placed: dict[Any, Placed] = field(default_factory=dict)

    @property
    def lead(self) -> list[int]:
        """The leading sizes, ``[B]`` or ``[B, T]``."""
        return list(self.ids.shape[:-1])

    def placed(self, layout: LayerLayout, dtype: str) -> Placed:
        """The routing in a layout, with factors of this dtype."""
        # What is made in a program inside is that program's alone.
        key = (layout, dtype, hosts.frame())
        if key not in self._placed:
            self._placed[key] = place(self, layout, dtype)
        return self._placed[key]


def place(routing: ActiveRouting, layout: LayerLayout, dtype: str) -> Placed:
    """Lay the active ranks of each row side by side: W blocks, as wide as the widest rank that can occur."""
    width = routing.ids.shape[-1]
    ids = ops.reshape(routing.ids, (-1, width))
    features, widest, bad = len(layout.ranks), layout.widest, None
    if routing.values is None:
        bad = ops.any(ids >= features, axis=1)
    else:
        widest = int(layout.lengths[routing.values].max(initial=0))
    ids = ops.where(ops.logical_or(ids < 0, ids >= features), features, ids)
    slots = ops.arange(widest, dtype="int32")
    shape = (ids.shape[0], width * widest)
    used = slots < ops.take(ops.convert_to_tensor(layout.lengths), ids, axis=0)[..., None]
    first = ops.take(ops.convert_to_tensor(layout.starts), ids, axis=0)[..., None]
    rows = ops.where(used, first + 1 + slots, 0)
    scales = ops.convert_to_tensor(layout.arrays()[1].astype(dtype))
    scale, awake = ops.take(scales, ids, axis=0), used
    if routing.weights is not None:
        weights = ops.cast(ops.reshape(routing.weights, (-1, width)), dtype)
        scale = scale * weights
        asleep = ops.equal(ops.stop_gradient(weights), 0)[..., None]
        awake = ops.logical_and(used, ops.logical_not(asleep))
    scale = ops.where(used, scale[..., None], ops.zeros((), dtype))
    rows, scale, awake = (ops.reshape(x, shape) for x in (rows, scale, awake))
    return Placed(ops.cast(rows, "int32"), scale, awake, 1 + layout.rows, bad)


def host_values(what: str, value: Any) -> NDArray[Any] | None:
    """A value as a numpy array, or None if it is known only when a compiled function runs.

    Raises:
        RoutingError: it is not an array.
    """
    if not hosts.known(value):
        return None
    return as_array(what, ops.convert_to_numpy(value) if ops.is_tensor(value) else value)


def make_routing(
    registry: FeatureRegistry,
    features: Any,
    weights: Any = None,
    *,
    batch: int | None = None,
    lengths: Sequence[Any] = (),
) -> ActiveRouting:
    """Check routing and make it ready for a forward.

    Args:
        registry: the model's registry.
        features: ids as a tensor, array or nested list, or a :class:`flix.Routing`.
        weights: floats in the shape of the ids, or None.
        batch: the number of rows of the batch, if known.
        lengths: what may be the sequence length.

    Raises:
        RoutingError: routing that breaks a rule; the row is named.
    """
    features, weights = unpacked(registry, features, weights)
    ids = host_values("flix_features", features)
    factors = None if weights is None else host_values("flix_weights", weights)
    unlike = None
    if ids is not None:
        check_routing(ids, factors, registry, batch=batch)
        if weights is None or factors is not None:
            unlike = first_unlike(ids, factors)
        features = ids = ids.astype(np.int32)
    weights = None if weights is None else ops.convert_to_tensor(weights)
    if ids is None or factors is None:
        check_form(features, weights, batch=batch)
    tensor = ops.cast(ops.convert_to_tensor(features), "int32")
    if ids is None:
        tensor = _marked(tensor, registry)
    return ActiveRouting(registry, tensor, weights, lengths, unlike, ids)


def _marked(ids: Any, registry: FeatureRegistry) -> Any:
    """Traced ids, with the number of features for those of no feature, or of a removed one, of which NaN is made."""
    bad = ops.logical_or(ids < -1, ids >= len(registry))
    for gone in registry.removed_ids if registry.removed else ():
        bad = ops.logical_or(bad, ids == int(gone))
    return ops.where(bad, len(registry), ids)


def in_force(name: str) -> ActiveRouting:
    """The routing that a layer runs under.

    Args:
        name: the layer; for messages.

    Raises:
        RoutingError: there is none, or it was put in force around a function that is being compiled.
    """
    routing: ActiveRouting | None = current.routing
    if routing is None:
        raise messages.unrouted_layer(name, CALL)
    here = hosts.frame()
    if here == routing.frame or (here is not None and here == current.innermost("rerun")):
        return routing
    raise messages.routed_from_around(name, CALL)


def is_off(state: Any, name: str) -> bool:
    """Whether a model is its base alone here."""
    return current.is_off(state)


def switch(state: Any, by: int) -> None:
    """Open a ``disable`` block (1), or close the last one (-1)."""
    hosts.switched(state, by)
    current.switch(state, by)


route = by_hand(current, make_routing)
