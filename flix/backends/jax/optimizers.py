"""Optimizers that leave absent features alone: parameters and optimizer state keep their bits.

Any optax optimizer moves a parameter whose gradient is zero (momentum, weight decay). Features absent from a batch must
not move, so their rows are masked (:func:`mask_absent`), or never touched (:func:`sparse_update`, whose cost is that of
the batch's features only). Features that are frozen count as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from flix.backends.jax import sums, transforms
from flix.backends.jax.functional import pick_rows, put_rows
from flix.backends.jax.layers import FlixLayer
from flix.backends.jax.parameters import Bank, LayerBank, LayerSpec, Rows
from flix.backends.jax.sharding import left_to_compiler
from flix.backends.jax.transforms import WHOLE
from flix.core.errors import ConfigError
from flix.core.features.routing import Routing


def specs_of(model: nnx.Module) -> dict[str, LayerSpec]:
    """The spec of every adapted layer, by its path from this module."""
    return {
        ".".join(map(str, path)): module.flix_spec
        for path, module in nnx.iter_modules(model)
        if isinstance(module, FlixLayer)
    }


def leaf_specs(tree: Any, specs: Mapping[str, LayerSpec]) -> Any:
    """The tree with each table's LayerSpec in its place, and ``WHOLE`` for leaves that are not tables.

    Args:
        tree: a pytree that holds LayerBanks, or the pure state of an nnx model.
        specs: of an nnx model, see :func:`specs_of`.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, LayerBank):
            return jax.tree.map(lambda _: leaf.spec, leaf)
        parts = _keys(path)
        if parts and parts[-1] in ("flix_A", "flix_B"):
            return specs[".".join(parts[:-1])]
        return WHOLE

    found = jax.tree_util.tree_map_with_path(
        of, tree, is_leaf=lambda node: isinstance(node, LayerBank)
    )
    if not any(isinstance(leaf, LayerSpec) for leaf in jax.tree.leaves(found)):
        raise ConfigError(
            "no low-rank tables among the parameters; for an nnx model, pass the adapted model: "
            "mask_absent(tx, model)"
        )
    return found


def acting(ids: Any) -> Any:
    """Ids as they were given; of a routing, without those whose weights are 0."""
    return np.where(ids.weights == 0, -1, ids.ids) if isinstance(ids, Routing) else ids


def _present(updates: Any, ids: Any, specs: Any) -> Array:
    """Which features a batch activates, bool ``[F]``: those of ids, or any whose gradient in a layer is not zero."""
    tables = [
        (spec, grad)
        for spec, grad in zip(jax.tree.leaves(specs), jax.tree.leaves(updates), strict=True)
        if spec is not WHOLE
    ]
    count = len(tables[0][0].ranks)
    if ids is not None:
        ids = jnp.asarray(acting(ids))

        def named(ids: Array) -> Array:
            return jnp.zeros(count, bool).at[jnp.where(ids < 0, count, ids)].set(True, mode="drop")

        return left_to_compiler(named, None, ids)  # type: ignore[no-any-return]
    present: Any = False
    for spec, grad in tables:

        def hit(grad: Array, owners: Any = spec.owners, axis: int = len(spec.lead)) -> Array:
            rows = (grad != 0).any(axis=tuple(i for i in range(grad.ndim) if i != axis))
            return jnp.zeros(count, bool).at[owners].max(rows)

        present = present | left_to_compiler(hit, None, grad)
    return present  # type: ignore[no-any-return]


def mask_absent(
    inner: optax.GradientTransformation, model: nnx.Module | None = None
) -> optax.GradientTransformationExtraArgs:
    """An optax optimizer that keeps absent features, and its state for them, bit-identical.

    A feature is present if the update is told so, ``update(grads, state, params, flix_features=ids)`` (through
    ``nnx.Optimizer``: ``optimizer.update(model, grads, flix_features=ids)``), or else if any of its gradients is not
    zero. State that belongs to no single parameter, such as the step count of Adam or of a schedule, advances with
    every step.

    Args:
        inner: the optimizer; its state for a parameter must have the parameter's leading axis (Adam, SGD, Lion and
            others do; Adafactor's factored moments do not).
        model: the adapted nnx model whose state is optimized; not needed for banks.

    Raises:
        ConfigError: on use, parameters that have no tables, or a state of another shape.
    """
    specs = {} if model is None else specs_of(model)
    transforms.check(inner, "mask_absent")
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: Any, state: Any, params: Any = None, *, flix_features: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        found = leaf_specs(updates, specs)
        present = _present(updates, flix_features, found)
        return _masked(inner, updates, state, params, present, found, extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _masked(
    inner: Any, updates: Any, state: Any, params: Any, present: Array, specs: Any, extra: Any
) -> tuple[Any, Any]:
    """The inner update and its state; of features that are neither present nor trained, what was there.

    Args:
        inner, updates, state, params, extra: of an optax update.
        present: flags by feature, bool ``[F]``, or ids as :func:`touched` gives them.
        specs: see :func:`leaf_specs`.
    """
    if present.dtype != bool:
        count = next(len(s.ranks) for s in jax.tree.leaves(specs) if s is not WHOLE)
        present = jnp.zeros(count, bool).at[present].set(True, mode="drop")

    def mask(spec: Any) -> Any:
        if spec is WHOLE:
            return WHOLE
        return (present & spec.trainable)[spec.owners].reshape(*[1] * len(spec.lead), -1)

    masks = jax.tree.map(mask, specs)
    inner = optax.with_extra_args_support(inner)
    changed, new_state = inner.update(updates, state, params, **extra)

    def choose(rows: Any, new: Any, old: Any) -> Any:
        if rows is WHOLE:
            return new
        _check_rows(rows.shape[-1], new, rows.ndim - 1)
        return jnp.where(rows.reshape(*rows.shape, *[1] * (new.ndim - rows.ndim)), new, old)

    # x + (-0.0) is x, bit by bit, for every x.
    still = jax.tree.map(
        lambda rows, u: u if rows is WHOLE else choose(rows, u, -0.0 * jnp.ones_like(u)),
        masks,
        changed,
    )
    return still, jax.tree.map(choose, _over_state(state, masks), new_state, state)


def _check_rows(rows: int, leaf: Any, axis: int) -> None:
    if leaf.shape[axis : axis + 1] != (rows,):
        raise ConfigError(
            f"the optimizer keeps state of shape {list(leaf.shape)} for a table of {rows} rows; "
            f"absent features can be left alone only if it keeps state for each row"
        )


def _over_state(state: Any, leaves: Any) -> Any:
    """A tree of the optimizer state's structure, with the leaf of its parameter in each place, or ``WHOLE``.

    A parameter's state stands under its parameter's path, whatever holds it: so do ``optax.partition`` and ``masked``
    keep it, of whose labels ``optax.tree_map_params`` knows nothing.
    """
    by_path = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)}

    def of(path: tuple[Any, ...], _: Any) -> Any:
        keys = _keys(path)
        ends = (keys[i:] for i in range(len(keys)))
        return next((by_path[end] for end in ends if end in by_path), WHOLE)

    return jax.tree_util.tree_map_with_path(of, state)


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def sparse_step(
    tx: optax.GradientTransformation,
    grads: Any,
    state: Any,
    params: Any,
    specs: Any,
    present: Array,
    **extra: Any,
) -> tuple[Any, Any]:
    """:func:`sparse_update` for any tree of tables ``params``, with its :func:`leaf_specs`: (new params, new state).

    The gradients are those of the rows that :func:`take` takes, in the structure of ``params``.
    """
    transforms.check(tx, "an update of a batch's features")
    if not transforms.by_rows(tx, params, specs):
        return _spread_step(tx, grads, state, params, specs, present, **extra)
    tx = optax.with_extra_args_support(tx)

    def writable(spec: LayerSpec, at: At) -> At:
        if not spec.frozen:
            return at
        trains = jnp.take(spec.trainable, present, mode="fill", fill_value=False)
        return At(jnp.where(jnp.repeat(trains, spec.widest), at.index, spec.rows), at.axis)

    reads = row_indices(specs, present)
    writes = jax.tree.map(lambda s, i: i if s is WHOLE else writable(s, i), specs, reads)

    def put(at: Any, old: Any, new: Any) -> Any:
        return new if at is WHOLE else put_rows(old, at.index, new, at.axis)

    for spec, leaf in zip(
        jax.tree.leaves(_over_state(state, specs)), jax.tree.leaves(state), strict=True
    ):
        if spec is not WHOLE:
            _check_rows(spec.rows, leaf, len(spec.lead))
    small, small_state = take(reads, params), take(_over_state(state, reads), state)
    updates, new_state = tx.update(grads, small_state, small, **extra)
    small = optax.apply_updates(small, updates)
    return (
        jax.tree.map(put, writes, params, small),
        jax.tree.map(put, _over_state(state, writes), state, new_state),
    )


def _spread_step(
    tx: optax.GradientTransformation,
    grads: Any,
    state: Any,
    params: Any,
    specs: Any,
    present: Array,
    **extra: Any,
) -> tuple[Any, Any]:
    """:func:`sparse_step` for what looks at a table as a whole: at the cost of the whole tables."""

    def spread(at: Any, rows: Any, table: Any) -> Any:
        return rows if at is WHOLE else put_rows(jnp.zeros_like(table), at.index, rows, at.axis)

    whole = jax.tree.map(spread, row_indices(specs, present), grads, params)
    updates, state = _masked(tx, whole, state, params, present, specs, extra)
    return optax.apply_updates(params, updates), state


def sparse_update(
    tx: optax.GradientTransformation,
    grads: Rows,
    state: Any,
    bank: Bank,
    present: Array,
    **extra: Any,
) -> tuple[Bank, Any]:
    """One optimizer step on the rows of a batch's features; the cost does not grow with registered features.

    Every other row of the bank and of the optimizer's state keeps its bits. Under ``jit``, donate ``bank`` and
    ``state``, so that they are changed in place.

    Args:
        tx: an optax optimizer; ``state`` was made by ``tx.init(bank)``.
        grads: gradients with respect to the rows from :func:`gather`.
        state: the optimizer's state.
        bank: the bank.
        present: the features, as for :func:`gather`.
        extra: further arguments of ``tx.update``.

    Returns:
        (bank, state).

    Raises:
        ConfigError: an optimizer whose state has no row for each row of the tables.
    """
    whole = {path: LayerBank(g.A, g.B, bank[path].spec) for path, g in grads.items()}
    new, state = sparse_step(tx, whole, state, bank, leaf_specs(bank, {}), present, **extra)
    return new, state


class FeatureAdamState(NamedTuple):
    """State of :func:`scale_by_feature_adam`: a step count for each row of each table, and the moments."""

    count: Any
    mu: Any
    nu: Any


def scale_by_feature_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam with a step count for every row, so that a feature's bias correction counts its own steps.

    With one count for all, a feature that is first seen late would take steps up to three times too long. torch also
    counts by parameter: under :func:`mask_absent` or :func:`sparse_update`, the two agree.
    """

    def init(params: Any) -> FeatureAdamState:
        pure = nnx.as_pure(params)
        counts = jax.tree.map(
            lambda p: jnp.zeros((*p.shape[:-1], 1) if p.ndim > 1 else p.shape, jnp.int32), pure
        )
        # Two trees of zeros, not one twice: a buffer can be donated once.
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return FeatureAdamState(counts, mu, nu)

    def update(updates: Any, state: FeatureAdamState, params: Any = None) -> tuple[Any, Any]:
        count = jax.tree.map(lambda c: c + 1, state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)

        def step(m: Array, v: Array, c: Array) -> Array:
            t = c.astype(m.dtype)
            return (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps)

        return jax.tree.map(step, mu, nu, count), FeatureAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def adamw(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> optax.GradientTransformation:
    """AdamW whose bias correction counts each feature's own steps; otherwise ``optax.adamw``, with torch's defaults.

    Args:
        learning_rate: a number, or an optax schedule over all steps.
        b1, b2, eps, weight_decay: as in torch.
    """
    return optax.chain(
        scale_by_feature_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


@dataclass(frozen=True, eq=False)
class At:
    """Where rows stand in a table: their numbers, and the axis that the rows are along."""

    index: Array
    axis: int


def row_indices(specs: Any, present: Array) -> Any:
    """Where the rows of some features stand in each table of a tree, :class:`At`; ``WHOLE`` for other leaves."""

    def at(spec: Any) -> Any:
        return WHOLE if spec is WHOLE else At(sums.row_index(spec, present), len(spec.lead))

    return jax.tree.map(at, specs)


def take(places: Any, params: Any) -> Any:
    """The rows at these places, out of every table of a tree; other leaves whole."""

    def of(at: Any, table: Any) -> Any:
        return table if at is WHOLE else pick_rows(table, at.index, at.axis)

    return jax.tree.map(of, places, params)
