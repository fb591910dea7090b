"""What is done feature by feature in training: losses, clipping, learning rates and steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from flix.backends.jax.optimizers import leaf_specs, specs_of
from flix.backends.jax.parameters import LayerSpec
from flix.backends.jax.routing import is_traced
from flix.backends.jax.transforms import WHOLE
from flix.core.checks import finite, whole
from flix.core.errors import ConfigError, RoutingError, listed
from flix.core.features.names import written
from flix.core.features.owners import per_feature, positive, row_owners
from flix.core.features.routing import Routing, check_form
from flix.core.features.table import FeatureTable


def losses_by_feature(
    losses: Any,
    features: Any,
    group: str,
    *,
    counts: Any = None,
    registry: FeatureTable | None = None,
) -> Array:
    """The mean loss of each feature of a group over its own rows, which is the loss that it would have alone.

    Differentiate the sum. The gradient of a row goes to its own feature, divided by that feature's count, so the
    number of rows that others have in the batch changes nothing. Losses that are not finite stay with their feature.
    The function works inside ``jit``; there, a row that names two features of the group gives both NaN, and outside
    it is an error.

    Args:
        losses: ``[batch]`` or ``[batch, length]``, before any mean.
        features: a :class:`flix.Routing`, or ids ``[batch, width]`` or ``[batch, length, width]``.
        group: the group; each row names one of its features, or none, in which case it counts for nobody.
        counts: how much each loss counts, of the shape of ``losses``; default: 1 each.
        registry: the registry of the ids, if ``features`` is not a Routing.

    Returns:
        ``[n]``, in the order of ``registry.names(group)``; 0 for features for which nothing counts.

    Raises:
        FeatureError: no such group.
        RoutingError: losses and routing of different batches, or a row that names two features of the group.
    """
    if isinstance(features, Routing):
        features, registry = features.ids, features.registry
    if registry is None:
        raise RoutingError(
            "ids alone do not say to which registry they belong: give registry=config.registry, "
            "or a Routing (registry.encode(rows))"
        )
    if is_traced(features):
        check_form(features)
    else:
        row_owners(np.asarray(features), registry, group)
    losses, ids = jnp.asarray(losses), jnp.asarray(features)
    if losses.ndim == 0 or losses.shape[0] != ids.shape[0]:
        raise RoutingError(
            f"losses must have an entry for each row, [{ids.shape[0]}] or [{ids.shape[0]}, length], got "
            f"{list(losses.shape)}; take them before any mean"
        )
    counts = jnp.ones_like(losses) if counts is None else jnp.asarray(counts).astype(losses.dtype)
    if counts.shape != losses.shape:
        raise RoutingError(
            f"counts must have the shape of losses, {list(losses.shape)}, got {list(counts.shape)}"
        )
    members = registry.ids_of(group)
    n = len(members)
    slots = np.full(len(registry) + 1, -1, np.int32)
    slots[list(members)] = np.arange(n)
    batch = losses.shape[0]
    own = jnp.take(slots, jnp.where(ids < 0, len(registry), ids), mode="fill", fill_value=-1)
    own = own.reshape(batch, math.prod(own.shape[1:]))
    last = own.max(axis=1, initial=-1)
    # Selected, not multiplied: 0 times what is not finite is NaN.
    kept = jnp.where(counts != 0, losses * counts, 0).reshape(batch, -1).sum(1)
    count = counts.reshape(batch, -1).sum(1)

    def summed(owner: Array, values: Array) -> Array:
        place = jnp.where(owner < 0, n, owner)
        return jnp.zeros(n, values.dtype).at[place].add(values, mode="drop")

    total = summed(last, count)
    means = jnp.where(total == 0, 0, summed(last, kept) / jnp.where(total == 0, 1, total))
    both = (own >= 0) & (own != last[:, None])
    coupled = summed(own.reshape(-1), both.reshape(-1).astype(losses.dtype))
    coupled += summed(last, both.any(1).astype(losses.dtype))
    return jnp.where(coupled > 0, jnp.nan, means)


class FeatureNormState(NamedTuple):
    """State of :func:`clip_by_feature_norm`: whose each row of each table is."""

    owner: Any


def clip_by_feature_norm(
    max_norm: float | Mapping[Any, float], model: nnx.Module | None = None
) -> optax.GradientTransformation:
    """Clip the updates of each feature by its own norm over all layers.

    A gradient that is large or not finite changes no other feature's gradient.

    Args:
        max_norm: the largest norm, for all features, or by ``(group, name)`` or group; features that a mapping leaves
            out are not clipped.
        model: the adapted nnx model whose state is optimized; not needed for banks.

    Raises:
        ConfigError: a norm that is not positive; on use, parameters that are no tables.
        FeatureError: on use, an unknown feature or group.
    """
    specs = {} if model is None else specs_of(model)
    if not isinstance(max_norm, Mapping):
        positive(max_norm, "max_norm")

    def init(params: Any) -> FeatureNormState:
        found = _tables("clip_by_feature_norm", nnx.as_pure(params), specs)
        _table("max_norm", max_norm, _registry(found), positive, math.inf)
        return FeatureNormState(_owners(nnx.as_pure(params), found))

    def update(updates: Any, state: FeatureNormState, params: Any = None) -> tuple[Any, Any]:
        pure = nnx.as_pure(updates)
        registry = _registry(_tables("clip_by_feature_norm", pure, specs))
        limits = _table("max_norm", max_norm, registry, positive, math.inf)
        owners = jax.tree.leaves(nnx.as_pure(state.owner))
        squares: Any = 0
        for grad, owner in zip(jax.tree.leaves(pure), owners, strict=True):
            each = (grad * grad).sum(-1).reshape(-1)
            squares += jnp.zeros(len(registry), each.dtype).at[owner.reshape(-1)].add(each)
        norms = jnp.sqrt(squares)
        # Limits without an end, and norms of 0, are divided by nothing.
        factors = jnp.where(norms <= limits, 1, limits / jnp.where(norms == 0, 1, norms))

        def scaled(grad: Array, owner: Array) -> Array:
            return (grad * factors[owner]).astype(grad.dtype)

        return jax.tree.map(scaled, updates, state.owner), state

    return optax.GradientTransformation(init, update)


class FeatureRateState(NamedTuple):
    """State of :func:`scale_by_feature_rate`: whose each row of each table is, and how many steps it has taken."""

    owner: Any
    count: Any


Rate = float | Callable[[Any], Any]


def scale_by_feature_rate(
    rate: Rate | Mapping[Any, Rate],
    model: nnx.Module | None = None,
    *,
    steps: int | Mapping[Any, int] | None = None,
) -> optax.GradientTransformation:
    """Scale each feature's updates by its own learning rate, negated, at its own count of steps.

    Put it last in a chain, in place of ``optax.scale_by_learning_rate``. Under :func:`mask_absent`, ``FlixOptimizer``
    or :func:`sparse_update`, a feature's schedule advances only with its own steps::

        tx = optax.chain(
            clip_by_feature_norm(1.0),
            scale_by_feature_adam(),
            scale_by_feature_rate({("tenant", "ann"): 1e-3, ("tenant", "ben"): schedule}, steps=500),
        )

    Args:
        rate: a learning rate or an optax schedule for all features, or one by ``(group, name)`` or group; every
            feature needs one.
        model: the adapted nnx model whose state is optimized; not needed for banks.
        steps: the number of steps after which features stop and keep their bits; features that a mapping leaves out
            do not stop.

    Raises:
        ConfigError: on use, a feature without a rate, a rate that is not finite, or parameters that are no tables.
        FeatureError: on use, an unknown feature or group.
    """
    specs = {} if model is None else specs_of(model)

    def of(registry: FeatureTable) -> Any:
        return _rates(registry, _frozen(rate), None if steps is None else _frozen(steps))

    def init(params: Any) -> FeatureRateState:
        pure = nnx.as_pure(params)
        found = _tables("scale_by_feature_rate", pure, specs)
        of(_registry(found))
        owner = _owners(pure, found)
        return FeatureRateState(owner, jax.tree.map(jnp.zeros_like, owner))

    def update(updates: Any, state: FeatureRateState, params: Any = None) -> tuple[Any, Any]:
        registry = _registry(_tables("scale_by_feature_rate", nnx.as_pure(updates), specs))
        fixed, schedules, which, limits = of(registry)

        def scaled(update: Array, owner: Array, count: Array) -> Array:
            value = jnp.asarray(fixed, update.dtype)[owner]
            for k, schedule in enumerate(schedules):
                planned = jax.vmap(schedule)(count.reshape(-1)).reshape(count.shape)
                value = jnp.where(jnp.asarray(which)[owner] == k, planned, value)
            ends = count >= jnp.asarray(limits)[owner]
            # x + (-0.0) is x, bit by bit, for every x.
            return jnp.where(ends, -0.0, -value * update).astype(update.dtype)

        new = jax.tree.map(scaled, updates, state.owner, state.count)
        count = jax.tree.map(lambda c: c + 1, state.count)
        return new, FeatureRateState(state.owner, count)

    return optax.GradientTransformation(init, update)


def _frozen(given: Any) -> Any:
    return tuple(given.items()) if isinstance(given, Mapping) else given


@functools.lru_cache(maxsize=64)
def _rates(registry: FeatureTable, rate: Any, steps: Any) -> Any:
    """Fixed rates by id, the schedules, which of them each feature has (-1: none), and after how many steps it ends."""

    def check(value: Any, what: str) -> Any:
        return value if callable(value) else finite(value, what)

    rate, steps = (dict(v) if isinstance(v, tuple) else v for v in (rate, steps))
    rates = per_feature("rate", rate, registry, check)
    missing = [written(f) for f in registry.live if f not in rates]
    if missing:
        raise ConfigError(f"rate must name every feature, but {listed(missing, 5)} is missing")
    schedules = list(dict.fromkeys(v for v in rates.values() if callable(v)))
    fixed = np.zeros(len(registry))
    which = np.full(len(registry), -1, np.int32)
    for feature, value in rates.items():
        i = registry.id(*feature)
        if callable(value):
            which[i] = schedules.index(value)
        else:
            fixed[i] = value
    limits = _table("steps", steps, registry, lambda v, what: whole(v, what, 1), _NEVER)
    return fixed, schedules, which, limits.astype(np.int32)


_NEVER = np.iinfo(np.int32).max


def _table(what: str, given: Any, registry: FeatureTable, check: Any, default: Any) -> Any:
    """A setting by id."""
    found = {} if given is None else per_feature(what, given, registry, check)
    values = np.full(len(registry), default)
    for feature, value in found.items():
        values[registry.id(*feature)] = value
    return values


def _tables(what: str, tree: Any, specs: Mapping[str, LayerSpec]) -> Any:
    """The spec of each table of a tree, all of whose leaves must be tables."""
    found = leaf_specs(tree, specs)
    if any(spec is WHOLE for spec in jax.tree.leaves(found)):
        raise ConfigError(
            f"{what} works on the features' tables only, but there are other parameters too; "
            f"give those an optimizer of their own (optax.partition)"
        )
    return found


def _registry(found: Any) -> FeatureTable:
    spec: LayerSpec = jax.tree.leaves(found)[0]
    return spec.registry


def _owners(tree: Any, found: Any) -> Any:
    """The id of each row's feature, ``[*lead, rows, 1]`` for each table: state, so that it is taken with its rows."""

    def of(spec: LayerSpec, table: Any) -> Array:
        # Of other sizes are the tables on which transformations are tried out (``transforms.by_rows``).
        owners = np.resize(spec.owners, table.shape[-2])
        return jnp.array(np.broadcast_to(owners[:, None], (*table.shape[:-1], 1)), jnp.int32)

    return jax.tree.map(of, found, tree)


__all__ = ["clip_by_feature_norm", "losses_by_feature", "scale_by_feature_rate"]
