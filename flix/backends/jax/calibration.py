"""Layers for the planner's measurements (see :mod:`flix.core.strategy.calibrate`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from flix.backends.jax.bank import init
from flix.backends.jax.functional import gather, linear_rows, touched
from flix.core.config.config import FlixConfig
from flix.core.errors import ConfigError
from flix.core.strategy.calibrate import Run
from flix.core.strategy.decide import Facts


def device_class() -> str:
    """The class of devices that is measured here."""
    return f"jax-{jax.default_backend()}"


def use_threads(count: int | None) -> str:
    """What is measured, in words.

    Raises:
        ConfigError: a number of threads, which JAX has settled when it is imported.
    """
    if count is not None:
        raise ConfigError(
            "JAX takes the number of its threads from the environment when it starts; start flix on the "
            "processors that it shall use (taskset -c 0 flix bench calibrate --backend jax)"
        )
    return f"jax {jax.__version__}"


def make(config: FlixConfig, facts: Facts, ids: NDArray[np.int32], strategy: str | None) -> Run:
    """Value and gradients of one layer in float32, compiled; gradients of the input and the batch's features."""
    rng = np.random.default_rng(0)
    shape = (facts.examples, facts.tokens)
    x = jnp.asarray(rng.normal(size=(*shape, facts.d_in)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(*shape, facts.d_out)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(facts.d_in, facts.d_out)), jnp.float32)

    def frozen(x: Any, dy: Any) -> Any:
        y, back = jax.vjp(lambda x: x @ kernel, x)
        return y, back(dy)

    if strategy is None:
        plain = jax.jit(frozen)
        return lambda: jax.block_until_ready(plain(x, dy))  # type: ignore[no-untyped-call]

    def adapted(x: Any, bank: Any, ids: Any, dy: Any) -> Any:
        present = touched(ids, len(config.registry))

        def run(x: Any, rows: Any) -> Any:
            return linear_rows(x, kernel, rows["layer"], ids, present, strategy=strategy)

        y, back = jax.vjp(run, x, gather(bank, present))
        return y, back(dy)

    step, bank = jax.jit(adapted), init(config, {"layer": (facts.d_in, facts.d_out)})
    routing = jnp.asarray(ids)
    return lambda: jax.block_until_ready(step(x, bank, routing, dy))  # type: ignore[no-untyped-call]
