"""One composition folded into plain kernels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flix.backends.jax.bank import Bank
from flix.backends.jax.files import config_and_bank, to_adapter
from flix.backends.jax.layers import FlixEmbed, kernel_of
from flix.backends.jax.model import flix_layers, require_adapted, unadapt
from flix.core.adapter.composition import composition, delta
from flix.core.config.config import FlixConfig
from flix.core.errors import TargetError
from flix.core.features.encoding import Row

Model = TypeVar("Model", bound=nnx.Module)


def merge(model: Model, row: Row) -> Model:
    """A plain copy of an adapted nnx model with one composition folded into its kernels; no flix state is left.

    A kernel that several modules share is untied where its layer is adapted, since only that layer's changes. The
    table of an adapted Embed is folded for the lookup; an ``attend`` of the same module then reads the folded table too
    (a warning says so).

    Args:
        model: an adapted model; it is not changed.
        row: the composition, ``{group: name | [names] | {name: weight}}``.

    Raises:
        FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
        TargetError: the model is not adapted.
    """
    active = composition(require_adapted(model, "merge"), row)
    adapter = to_adapter(model)
    merged = copy.deepcopy(model)
    users: dict[int, int] = {}
    for _, module in nnx.iter_modules(merged):
        for value in vars(module).values():
            if isinstance(value, nnx.Variable):
                users[id(value)] = users.get(id(value), 0) + 1
    for path, layer in flix_layers(merged):
        kernel = kernel_of(layer)
        if isinstance(layer, FlixEmbed):
            warnings.warn(
                f"layer {path!r} is an adapted Embed: in the merged model its attend(), if it is used, "
                "reads the merged table too, where the adapted model's reads the base's",
                stacklevel=2,
            )
        update = layer.flix_form.unflatten(delta(adapter, path, active).T)
        value = _folded(kernel[...], update)
        if users[id(kernel)] == 1:
            kernel[...] = value
        else:
            untied = type(kernel)(value, **kernel.get_metadata())
            setattr(layer, "embedding" if isinstance(layer, FlixEmbed) else "kernel", untied)
    unadapt(merged)
    return merged


def merge_kernels(
    config: FlixConfig, bank: Bank, kernels: Mapping[str, Array], row: Row
) -> dict[str, Array]:
    """Kernels with one composition folded in, for the functional core.

    Args:
        config: the configuration.
        bank: ``{path: LayerBank}``.
        kernels: ``{path: kernel [d_in, d_out]}``; layers that are not adapted are handed back as they are.
        row: the composition.

    Raises:
        FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
        TargetError: an adapted layer without a kernel, or with one of other sizes.
    """
    config, bank = config_and_bank((config, bank), "merge_kernels")
    active = composition(config, row)
    adapter = to_adapter((config, bank))
    merged = dict(kernels)
    for path, shape in adapter.layers.items():
        kernel = kernels.get(path)
        if kernel is None or tuple(kernel.shape) != (shape.d_in, shape.d_out):
            found = "none" if kernel is None else list(kernel.shape)
            raise TargetError(
                f"layer {path!r} needs a kernel [{shape.d_in}, {shape.d_out}], got {found}"
            )
        merged[path] = _folded(kernel, delta(adapter, path, active).T)
    return merged


def _folded(kernel: Array, update: np.ndarray[Any, Any]) -> Array:
    """kernel + update, summed in float64, in the kernel's dtype and place."""
    host = np.asarray(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)), np.float64)
    value = jnp.asarray(host + update, kernel.dtype)
    placed: Array = jax.device_put(value, kernel.sharding)
    return placed
