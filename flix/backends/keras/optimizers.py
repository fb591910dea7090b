"""Optimizers that leave features absent from a batch bit-identical; see :mod:`flix.backends.keras.rows`."""

from __future__ import annotations

from typing import Any, TypeVar

import keras

from flix.backends.keras.engine import engine
from flix.backends.keras.parameters import is_table
from flix.backends.keras.patches import optimizers as patches
from flix.backends.keras.rows import RowOptimizer
from flix.core.errors import ConfigError

Optimizer = TypeVar("Optimizer", bound=keras.optimizers.Optimizer)


def keep_absent(optimizer: Optimizer, whole: bool = False) -> Optimizer:
    """Make a Keras optimizer, in place, leave the features absent from a batch as they are, bit by bit.

    ``compile`` of an adapted model does this, and an optimizer that is built for features' tables does it by itself:
    in loops written by hand, and in models around an adapted one or with flix layers of their own. By hand::

        optimizer = keep_absent(keras.optimizers.AdamW(1e-3))

    Args:
        optimizer: any Keras optimizer; of one that wraps others (loss scaling, several optimizers), those inside.
        whole: compute on whole tables and keep the rows in use, instead of on these rows alone: what XLA, whose
            sizes are fixed, compiles well. Gradient accumulation always does, and so do JAX and torch.

    Returns:
        The same optimizer.

    Raises:
        ConfigError: no Keras optimizer, or one with ``use_ema=True``.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(f"keep_absent needs a Keras optimizer, got {optimizer!r}")
    if hasattr(optimizer, "inner_optimizer"):
        keep_absent(optimizer.inner_optimizer, whole)
    elif type(optimizer).__name__ == "MultiOptimizer":
        patches.reach_inside(optimizer, lambda inner: keep_absent(inner, whole))
    elif isinstance(held := getattr(optimizer, "flix_rows", None), RowOptimizer):
        held.whole |= whole
    else:
        patches.put_on(optimizer, engine.RowOptimizer(optimizer, whole))
    return optimizer


def _keep_if_tables(optimizer: Any, variables: Any) -> None:
    if any(is_table(variable) for variable in variables):
        keep_absent(optimizer)


patches.install(_keep_if_tables)
