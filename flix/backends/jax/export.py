"""An adapted nnx model as a pure function of plain dictionaries, which ``jax.export`` can serialise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array

from flix.backends.jax.adapt import require_adapted

Params = dict[str, Array]


def export_fn(model: nnx.Module) -> tuple[Callable[..., Any], Params]:
    """The model as ``function(params, inputs, ids, weights=None)``, and its current ``params``.

    ``jax.export`` cannot serialise nnx states, or dictionaries whose keys are numbers (``nnx.List`` has them). So
    here, parameters are a flat dictionary by path. Routing is an input like any other::

        function, params = export_fn(model)
        (b,) = jax.export.symbolic_shape("b")              # a batch of any size
        ids = jax.ShapeDtypeStruct((b, 2), "int32")
        x = jax.ShapeDtypeStruct((b, 768), "float32")
        exported = jax.export.export(jax.jit(function))(params, x, ids)
        blob = exported.serialize()                        # elsewhere, without flix: jax.export.deserialize(blob)

    The function runs a copy of the model in evaluation mode (no dropout, statistics as they are); it can be compiled,
    differentiated and mapped like any other. The values of ids are not known when it is compiled, so a row with an id
    of no feature, or of a removed one, gives NaN. Random streams of the model are not parameters.

    Args:
        model: an adapted model; it is not changed.

    Returns:
        The function, whose ``inputs`` are an array, a tuple (the call's positional arguments) or a dictionary (its
        keywords), ``ids`` int ``[B, W]`` or ``[B, T, W]`` and ``weights`` floats in that shape; and the parameters,
        ``{"layers.0.q.kernel": array}``.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "export_fn")
    copy = nnx.clone(model)
    copy.eval()  # type: ignore[no-untyped-call]
    graph, random, state = nnx.split(copy, nnx.RngState, ...)  # type: ignore[misc]
    values, structure = jax.tree.flatten_with_path(state)
    value = jax.tree_util.GetAttrKey  # the step of a path from a Variable to its value
    names = [
        ".".join(str(getattr(key, "key", key)) for key in path if not isinstance(key, value))
        for path, _ in values
    ]

    def function(params: Params, inputs: Any, ids: Any, weights: Any = None) -> Any:
        found = jax.tree.unflatten(structure, [params[name] for name in names])
        merged = nnx.merge(graph, random, found, copy=True)
        keywords = inputs if isinstance(inputs, dict) else {}
        positional = () if keywords else inputs if isinstance(inputs, tuple) else (inputs,)
        return merged(*positional, **keywords, flix_features=ids, flix_weights=weights)

    return function, {name: value for name, (_, value) in zip(names, values, strict=True)}
