"""One composition folded into plain kernels."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from flix.backends.jax import around
from flix.backends.jax.adapt import detach, flix_layers
from flix.backends.jax.layers import FlixAround, FlixEmbed, form_of, kernel_of
from flix.backends.jax.stacks import members
from flix.backends.protocol import Updates
from flix.core.adapter.composition import Composition
from flix.core.errors import TargetError

M = TypeVar("M")


def dequantized(model: M, active: Composition, update: Updates) -> M:
    """As :func:`merged`, with plain layers in the place of those whose own forward is called."""
    return merged(model, active, update, dequantize=True)


def merged(model: M, active: Composition, update: Updates, *, dequantize: bool = False) -> M:
    """See :meth:`flix.backends.protocol.Backend.merged`.

    The table of an adapted Embed is folded for the lookup; an ``attend`` of the same module then reads the folded table
    too (a warning says so).
    """
    del active  # a plain module's call takes no routing
    if not isinstance(model, nnx.Module):
        raise TargetError(
            "merge needs a model; merge_kernels(config, bank, kernels, row) folds a bank into kernels"
        )
    plain = copy.deepcopy(model)
    modules = (module for _, module in nnx.iter_modules(plain))
    held = (v for module in modules for v in vars(module).values() if isinstance(v, nnx.Variable))
    users = Counter(map(id, held))
    own: dict[str, Any] = {}
    for path, layer in flix_layers(plain):
        around.check_own(layer, path)
        spec = layer.flix_spec
        if isinstance(layer, FlixAround):
            if spec.stack:
                raise TargetError(
                    f"layers {spec.stack[0]!r} to {spec.stack[-1]!r} ({type(layer).__name__}) cannot be merged: they are "
                    "one stack of layers with a forward of their own. Leave them out of target_modules to merge the rest"
                )
            own[path] = layer
            continue
        kernel, name = kernel_of(layer), "kernel"
        if isinstance(layer, FlixEmbed):
            name = "embedding"
            warnings.warn(
                f"layer {path!r} is an adapted Embed: in the merged model its attend(), if it is used, "
                "reads the merged table too, where the adapted model's reads the base's",
                stacklevel=3,
            )
        form = form_of(layer)
        parts = [form.unflatten(update(member.path).T) for member in members(spec)]
        value = folded(kernel[...], np.stack(parts).reshape(kernel.shape))
        if users[id(kernel)] == 1:
            kernel[...] = value
        else:
            setattr(layer, name, type(kernel)(value, **kernel.get_metadata()))
    detach(plain)
    for path, layer in own.items():
        (around.make_plain if dequantize else around.fold)(layer, path, update(path).T)
    return plain


def folded(kernel: Array, update: np.ndarray[Any, Any]) -> Array:
    """kernel + update, summed in float64, in the kernel's dtype and place."""
    host = np.asarray(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)), np.float64)
    value = jnp.asarray(host + update, kernel.dtype)
    placed: Array = jax.device_put(value, kernel.sharding)
    return placed
