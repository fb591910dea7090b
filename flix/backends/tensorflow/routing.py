"""The routing of the forward that is running, and its place in a layer (docs/specification.md §5.1.4).

An adapted model's call puts the routing here, the adapted layers read it, each thread and asyncio task its own.
:func:`in_force` gives it as a tensor of the function that is being traced, looked up at each call of that
function: what is cached by its arguments alone, such as a ``tf.function`` inside a layer, never serves one call's
routing to another.

Placing is done with TensorFlow operations, in eager mode and in graphs alike: nothing that depends on the values of
the ids is done in Python, so that a change of features never retraces. What depends on them (how many slots the
fullest row needs) are sizes of tensors; XLA compiles these as bounded dynamic sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flix.backends import messages
from flix.backends.forward import Forward, by_hand
from flix.backends.keras.inputs import CALL
from flix.backends.tensorflow.patches.captures import at_calls, kept, late, traced_function
from flix.core.config.layout import LayerLayout
from flix.core.features.names import written
from flix.core.features.registry import FeatureRegistry
from flix.core.features.routing import as_array, check_form, check_routing, unpacked
from flix.core.strategy.union import first_unlike

current = Forward()


def sizes(x: Any) -> list[Any]:
    """The shape of a tensor: numbers where they are known, else scalar tensors.

    Taking a size out of ``tf.shape(x)`` is an operation, which costs more in eager mode than what small layers compute.
    """
    static: list[Any] = x.shape.as_list()
    if None not in static:
        return static
    dynamic = tf.shape(x)
    return [dynamic[i] if n is None else n for i, n in enumerate(static)]


@dataclass(frozen=True, eq=False)
class Placed:
    """A batch's routing in one layout.

    Attributes:
        rows: int32 ``[N, R]``: the table row of each slot of each example; 0, the row of zeros, where unused.
        scale: ``[N, R]``, weight times s_f, 0 where unused; it carries gradient where the weights do.
        total: the table's number of rows.
        bound: the most slots that rows can have in all, N * R, where it is known from shapes.
        asleep: int32 ``[N, R]``: the table row of each slot whose weight is 0, which is unused otherwise; 0 for others.
            None where there are no weights.
    """

    rows: Any
    scale: Any
    total: int
    bound: int | None
    asleep: Any = None

    @functools.cached_property
    def union(self) -> tuple[Any, Any]:
        """The distinct table rows in use, int32 ``[U]``, and each slot's place among them, ``[N, R]``."""
        flat = tf.reshape(self.rows, [-1])
        if self.bound is not None and self.bound <= self.total:
            union, places = tf.unique(flat)
        else:  # at most `total` rows: the bound that XLA computes with
            used = tf.math.unsorted_segment_max(tf.ones_like(flat), flat, self.total) > 0
            union = tf.boolean_mask(tf.range(self.total), used)
            places = tf.gather(tf.cumsum(tf.cast(used, tf.int32)) - 1, flat)
        return union, tf.reshape(places, sizes(self.rows))

    @functools.cached_property
    def mask(self) -> Any:
        """Each example's factor for every row of the union: ``[N, U]``."""
        union, places = self.union
        count, size = sizes(self.rows)[0], sizes(union)[0]
        cells = tf.range(count)[:, None] * size + places
        mask = tf.math.unsorted_segment_sum(
            tf.reshape(self.scale, [-1]), tf.reshape(cells, [-1]), count * size
        )
        return tf.reshape(mask, [count, size])

    @functools.cached_property
    def used(self) -> Any:
        """Which rows of the union each example has a slot for: bool ``[N, U]``."""
        union, places = self.union
        count, size = sizes(self.rows)[0], sizes(union)[0]
        cells = tf.reshape(tf.range(count)[:, None] * size + places, [-1])
        found = tf.math.unsorted_segment_max(tf.ones_like(cells), cells, count * size)
        return tf.reshape(found > 0, [count, size])


@dataclass(eq=False)
class ActiveRouting:
    """Checked routing of one forward, placed once for all layers of a layout.

    Attributes:
        registry: whose ids they are.
        ids: int32 tensor ``[B, W]`` or ``[B, T, W]``.
        weights: a tensor of that shape, or None for 1.
        lengths: what may be the batch's sequence length (sizes, or scalar tensors where shapes do not tell), for
            layers that get flattened inputs.
        unlike: the first row (by token, and position) that differs from the first, where the values are known.
        traced: whether they are not; ids of the number of features then stand for those of no feature.
        graph: of the function in which it was made; None in eager mode.
    """

    registry: FeatureRegistry
    ids: Any
    weights: Any
    lengths: Sequence[Any] = ()
    unlike: tuple[int, ...] | None = None
    traced: bool = False
    graph: Any = field(default_factory=traced_function)
    _placed: dict[Any, Placed] = field(default_factory=dict)

    @property
    def lead(self) -> list[int | None]:
        """The leading sizes, ``[B]`` or ``[B, T]``, as far as shapes tell."""
        return self.ids.shape[:-1].as_list()  # type: ignore[no-any-return]

    def placed(self, layout: LayerLayout, dtype: Any) -> Placed:
        """The routing in a layout, with factors of this dtype."""
        # What is made inside a loop or branch is a tensor of that graph alone.
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        key = (layout, tf.as_dtype(dtype), graph)
        if key not in self._placed:
            self._placed[key] = place(self.ids, self.weights, layout, dtype, self.traced)
        return self._placed[key]


def place(ids: Any, weights: Any, layout: LayerLayout, dtype: Any, traced: bool = False) -> Placed:
    """Lay the active ranks of each row side by side.

    Args:
        ids: int32 ``[..., W]``, -1 for padding.
        weights: floats in that shape, or None.
        layout: the layer's ranks and scales.
        dtype: of the factors.
        traced: make NaN of rows with an id that is the number of features.
    """
    static_width = ids.shape[-1]
    width = static_width if static_width is not None else tf.shape(ids)[-1]
    ids = tf.reshape(ids, [-1, width])
    bad = tf.reduce_any(ids >= len(layout.ranks), axis=1) if traced else None
    ids = tf.where(ids < 0, len(layout.ranks), ids)
    lengths = tf.gather(layout.lengths, ids)
    ends = tf.cumsum(lengths, axis=1)
    totals = tf.reduce_sum(lengths, axis=1)
    longest = tf.maximum(tf.reduce_max(totals), 0)  # of no rows, reduce_max is the least integer
    if bad is not None:
        longest = tf.maximum(longest, tf.cast(tf.reduce_any(bad), tf.int32))
    slots = tf.range(width * layout.widest)[:longest]
    # The routing's column that a slot belongs to: as many columns as end at or before it.
    column = tf.reduce_sum(
        tf.cast(slots[None, :, None] >= ends[:, None, :], tf.int32), axis=2
    )  # [N, R]
    column = tf.minimum(column, tf.maximum(width - 1, 0))
    used = slots[None, :] < totals[:, None]
    feature = tf.gather(ids, column, batch_dims=1)
    within = slots[None, :] - tf.gather(ends - lengths, column, batch_dims=1)
    rows = tf.where(used, 1 + tf.gather(layout.starts, feature) + within, 0)
    scale = tf.gather(tf.constant(layout.arrays()[1], dtype), feature)
    if weights is not None:
        weights = tf.cast(tf.reshape(weights, [-1, width]), dtype)
        # By flat index: the gradient of a gather with batch_dims fails on an empty batch.
        cells = tf.range(sizes(ids)[0])[:, None] * width + column
        scale = scale * tf.gather(tf.reshape(weights, [-1]), cells)
    scale = tf.where(used, scale, tf.zeros_like(scale))
    if bad is not None:
        scale = tf.where(bad[:, None], tf.constant(np.nan, dtype), scale)
    asleep = None
    if weights is not None:
        # A feature with the weight 0 is absent, whatever its values are; its weight has a gradient all the same.
        off = scale == 0
        asleep, rows = tf.where(off, rows, 0), tf.where(off, 0, rows)
    count = ids.shape[0]
    bound = None
    if count is not None and static_width is not None:
        bound = count * static_width * layout.widest
    return Placed(rows=rows, scale=scale, total=1 + layout.rows, bound=bound, asleep=asleep)


def host_values(what: str, value: Any) -> NDArray[Any] | None:
    """A value as a numpy array, or None if it is known only when a graph runs.

    Raises:
        RoutingError: it is not an array.
    """
    if tf.is_tensor(value) and tf.is_symbolic_tensor(value):
        return None
    return as_array(what, value)


def make_routing(
    registry: FeatureRegistry,
    features: Any,
    weights: Any = None,
    *,
    batch: int | None = None,
    lengths: Sequence[Any] = (),
) -> ActiveRouting:
    """Check routing and make it ready for a forward.

    Values are checked where they are known, in eager mode; while a graph is traced, shapes and dtypes are.

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
        features = ids.astype(np.int32)
        if weights is None or factors is not None:
            unlike = first_unlike(features, factors)
    weights = None if weights is None else tf.convert_to_tensor(weights)
    if ids is None or factors is None:
        check_form(features, weights, batch=batch)
    tensor = tf.cast(tf.convert_to_tensor(features), tf.int32)
    if ids is None:
        tensor = _checked_at_run_time(tensor, registry)
    return ActiveRouting(registry, tensor, weights, lengths, unlike, traced=ids is None)


def in_force(name: str) -> ActiveRouting:
    """The routing in force, as the function that is being traced can use it.

    Args:
        name: the layer or model that asks; for messages.

    Raises:
        RoutingError: there is none. Where a traced function looks it up at a call, also routing of another form than
            the function was traced for.
    """
    routing: ActiveRouting | None = current.routing
    if routing is None:
        raise messages.unrouted_layer(name, CALL)
    graph = traced_function()
    if graph is routing.graph or graph is current.innermost("rerun"):
        return routing
    return _looked_up(routing, graph, name)


def _looked_up(routing: ActiveRouting, graph: Any, name: str) -> ActiveRouting:
    """The routing in force at each call of a function that is being traced."""
    rank = routing.ids.shape.rank
    dtype = tf.float32 if routing.weights is None else routing.weights.dtype
    key = f"flix_routing_{rank}_{dtype.name}"
    if key in kept(graph):
        return kept(graph)[key]  # type: ignore[no-any-return]

    def look_up() -> tuple[Any, ...]:
        found = in_force(name)
        if found.registry != routing.registry:
            raise messages.other_registry(name, found.registry, routing.registry)
        if found.ids.shape.rank != rank:
            forms = {2: "for routing by row", 3: "for routing by token"}
            raise messages.traced_otherwise(name, forms[rank], forms[found.ids.shape.rank])
        weights = found.weights
        if weights is None:
            weights = tf.ones(tf.shape(found.ids), dtype)
        lengths = [tf.reshape(length, [-1]) for length in found.lengths]
        return found.ids, tf.cast(weights, dtype), tf.concat([tf.zeros([0], tf.int32), *lengths], 0)

    unknown = [None] * rank
    specs = (
        tf.TensorSpec(unknown, tf.int32),
        tf.TensorSpec(unknown, dtype),
        tf.TensorSpec([None], tf.int32),
    )
    ids, weights, lengths = late(graph, key, look_up, specs)
    found = ActiveRouting(routing.registry, ids, weights, [lengths], None, True, graph)
    return kept(graph).setdefault(key, found)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Kind:
    """What a call of a model with this state must have functions traced apart for."""

    state: Any

    def __call__(self) -> Any:
        if current.is_off(self.state):
            return "off"
        return None if current.routing is None else current.routing.ids.shape.rank


def is_off(state: Any, name: str) -> bool:
    """Whether a model is its base alone here; what is traced now is then refused where that is otherwise.

    Args:
        state: the model's, or a layer's that is used by hand.
        name: the layer or model that asks; for messages.
    """
    graph = traced_function()
    blocks = [block for block in current.blocks if block.get("off") is state]
    value = bool(blocks)
    if graph is None or graph is current.innermost("rerun"):
        return value
    if any(block["graph"] is graph for block in blocks):
        return True  # the function that is being traced switched it off itself
    version = state.version

    def check() -> None:
        if state.version != version:
            what = "before features joined or left, froze or thawed"
            raise messages.traced_otherwise(name, what, "after that")
        if (now := is_off(state, name)) != value:
            what, other = (f"{'inside' if off else 'outside'} of disable" for off in (value, now))
            raise messages.traced_otherwise(name, what, other)

    at_calls(graph, id(state), check)
    return value


def _checked_at_run_time(ids: Any, registry: FeatureRegistry) -> Any:
    """Traced ids with a check of their values: an id of no feature, or a removed one, must not pass for the base.

    XLA leaves assertions out. There these ids become the number of features, of which placing makes NaN.
    """
    count = len(registry)
    bad = (ids < -1) | (ids >= count)
    rule = f"flix_features must be ids from 0 to {count - 1}, or -1 for padding"
    if registry.removed:
        gone = registry.removed_ids
        bad |= tf.reduce_any(ids[..., None] == tf.constant(gone, ids.dtype), axis=-1)
        names = ", ".join(f"{i} ({written(registry.features[i])})" for i in gone)
        rule += f", and not those of features that were removed, {names}"
    check = tf.debugging.Assert(~tf.reduce_any(bad), [f"{rule}; got", ids], summarize=64)
    with tf.control_dependencies([check]):
        return tf.where(bad, count, ids)


route: Final = by_hand(current, make_routing)
