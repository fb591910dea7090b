"""Training an adapted nnx model at the cost of the batch's features: gradients of their rows, and an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array

from flix.backends.jax import optimizers, transforms
from flix.backends.jax.adapt import require_adapted
from flix.backends.jax.functional import touched
from flix.backends.jax.layers import FlixParam
from flix.backends.jax.routing import ActiveRouting, current, is_traced
from flix.core.features.routing import check_routing


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["present", "rows"], meta_fields=[]
)
@dataclass(frozen=True)
class SparseGrads:
    """Gradients of the rows of a batch's features.

    Attributes:
        present: the features, as ``touched`` returns them.
        rows: the pure state of the model's parameters, with rows ``[U * R, ...]`` in place of each table.
    """

    present: Array
    rows: Any


def value_and_grad(
    loss: Callable[..., Any], *, wrt: Any = FlixParam, has_aux: bool = False
) -> Callable[..., Any]:
    """``nnx.value_and_grad`` for adapted models; the cost does not grow with registered features.

    The gradient is taken only with respect to the rows of the batch's features::

        value, grads = value_and_grad(loss)(model, ids, x, y)      # loss(model, ids, x, y)
        optimizer.update(model, grads)                             # a FlixOptimizer

    Under ``nnx.jit(step, donate_argnums=(0, 1))``, with (model, optimizer) first, the tables are changed in place;
    without donation, every step copies them, however few rows it changes. The function works inside and outside
    ``nnx.jit``. If the loss changes random streams or statistics, they change in the model.

    Args:
        loss: ``loss(model, ids, *args, **kwargs)``; it must pass these ids to the model, ``model(x,
            flix_features=ids)``. Features that are not among the ids give NaN. In a :class:`flix.Routing`, features
            with weight 0 are absent. In plain ids, all listed features are present, whatever weights the loss gives
            them.
        wrt: the filter for what to differentiate; with ``nnx.Any(FlixParam, ...)``, other parameters are
            differentiated as a whole.
        has_aux: the loss returns ``(value, aux)``.

    Returns:
        A function of (model, ids, ...) that returns the value (or ``(value, aux)``) and :class:`SparseGrads`.

    Raises:
        TargetError: on use, a model that is not adapted.
        RoutingError: on use, ids that break a rule.
    """

    def run(model: nnx.Module, ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, SparseGrads]:
        config = require_adapted(model, "value_and_grad")
        plain = optimizers.acting(ids)
        if not is_traced(plain):
            check_routing(np.asarray(plain), None, config.registry)
        present = touched(plain, len(config.registry))
        graphdef, params, rest = nnx.split(model, wrt, ...)  # type: ignore[misc]
        pure = nnx.as_pure(params)
        specs = optimizers.leaf_specs(pure, optimizers.specs_of(model))
        rows = optimizers.take(optimizers.row_indices(specs, present), pure)
        structure = jax.tree.structure(params)

        def of_rows(rows: Any) -> Any:
            values = jax.tree.unflatten(structure, jax.tree.leaves(rows))
            narrow = nnx.merge(graphdef, values, rest, copy=True)
            with current.under(present=ActiveRouting(None, present=present)):
                out = loss(narrow, ids, *args, **kwargs)
            value, aux = out if has_aux else (out, None)
            _, _, after = nnx.split(narrow, wrt, ...)  # type: ignore[misc]
            return value, (aux, nnx.as_pure(after))

        (value, (aux, changed)), grads = jax.value_and_grad(of_rows, has_aux=True)(rows)
        nnx.update(model, changed)
        return ((value, aux) if has_aux else value), SparseGrads(present, grads)

    return run


class FlixOptimizer(nnx.Optimizer):  # type: ignore[type-arg]
    """An ``nnx.Optimizer`` that keeps absent and frozen features bit-identical.

    It takes the gradients of :func:`value_and_grad` (then a step costs what the batch's features cost), or nnx's own.
    Make a new optimizer after ``add_feature``.

    Args:
        model: an adapted model.
        tx: an optax optimizer; :func:`flix.backends.jax.adamw` counts Adam's steps by feature.
        wrt: what to train; default: only the adapters.

    Raises:
        TargetError: the model is not adapted.
        ConfigError: an optimizer that cannot keep features apart: ``optax.MultiSteps``, ``muon``, ``sm3``.
    """

    def __init__(
        self, model: Any, tx: optax.GradientTransformation, *, wrt: Any = FlixParam
    ) -> None:
        require_adapted(model, "FlixOptimizer")
        transforms.check(tx, "FlixOptimizer")
        super().__init__(model, tx, wrt=wrt)

    def update(self, model: Any, grads: Any, /, **kwargs: Any) -> None:  # type: ignore[override]
        """Update the model and the optimizer's state.

        Args:
            model: the model.
            grads: :class:`SparseGrads`, or the state that ``nnx.grad`` returns.
            kwargs: arguments of the optimizer's update. With nnx's gradients, also pass ``flix_features=ids``, the
                batch's ids; without them, a feature counts as present if any of its gradients is not zero.
        """
        params = nnx.as_pure(nnx.state(model, self.wrt))
        state = nnx.as_pure(self.opt_state)
        extra = nnx.as_pure(kwargs)
        if isinstance(grads, SparseGrads):
            extra.pop("flix_features", None)
            specs = optimizers.leaf_specs(params, optimizers.specs_of(model))
            new_params, new_state = optimizers.sparse_step(
                self.tx, grads.rows, state, params, specs, grads.present, **extra
            )
        else:
            pure = nnx.as_pure(nnx.state(grads, self.wrt))
            updates, new_state = optimizers.mask_absent(self.tx, model).update(
                pure, state, params, **extra
            )
            new_params = optax.apply_updates(params, updates)
        nnx.update(model, new_params)
        nnx.update(self.opt_state, nnx.state(new_state))
        self.step[...] += 1
