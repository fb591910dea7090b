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
    """Change a Keras optimizer, in place, so that it keeps features that are absent from a batch bit for bit.

    ``compile`` of an adapted model does this. An optimizer that is built for features' tables elsewhere does it by
    itself: in loops of your own, in models around an adapted one, and in models with flix layers. By hand::

        optimizer = keep_absent(keras.optimizers.AdamW(1e-3))

    Args:
        optimizer: any Keras optimizer; if it wraps others (loss scaling, several optimizers), those inside are
            changed.
        whole: compute on whole tables and keep the rows in use, instead of computing only on these rows. XLA, with
            its fixed sizes, compiles this well. Gradient accumulation, JAX and torch always do it.

    Returns:
        The same optimizer.

    Raises:
        ConfigError: not a Keras optimizer, or one with ``use_ema=True``.
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
