"""The loss of a model's examples under weights, and its slope, for ``search_weights``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from flix.core.errors import TargetError
from flix.core.features.search import Ask, BatchLoss


@contextmanager
def asking(model: Any, loss: BatchLoss) -> Iterator[Ask]:
    """See :class:`flix.backends.protocol.SupportsSearching`.

    Outputs are compiled; the loss is, too, where its slope is asked.
    """
    if isinstance(model, tuple):
        raise TargetError(
            "search_weights needs a model; a bank is never called: give flix.search_weights the loss of a row"
        )
    twin = nnx.merge(*nnx.split(model))  # random streams and modes of the model stay
    twin.eval()
    graph, state = nnx.split(twin)

    def called(state: Any, inputs: Any, ids: Any, weights: Any) -> Any:
        # A copy: transformations inside the model refuse variables of a trace around theirs.
        module = nnx.merge(graph, state, copy=True)
        return module(**inputs, flix_features=ids, flix_weights=weights)

    def valued(weights: Any, state: Any, batch: Any, ids: Any) -> Any:
        return loss(called(state, _inputs(model, batch), ids, weights), batch)

    outputs, sloping = jax.jit(called), jax.jit(jax.value_and_grad(valued))

    def ask(
        batch: Mapping[str, Any], ids: NDArray[Any], weights: NDArray[Any], sloped: bool
    ) -> tuple[float, NDArray[np.float64] | None]:
        if not sloped:
            y = outputs(state, _inputs(model, batch), ids, weights)
            return float(loss(y, batch)), None
        value, slope = sloping(jnp.asarray(weights), state, dict(batch), ids)
        return float(value), np.asarray(slope, np.float64)

    yield ask


def _inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's call has a name for."""
    taken = inspect.signature(type(model).__call__).parameters
    if any(p.kind == inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        return dict(batch)
    return {name: value for name, value in batch.items() if name in taken}
