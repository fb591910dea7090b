"""Trained heads: parameters of an nnx model's base that are saved with the features.

nnx knows no parameter that trains by itself: what an optimizer is made for does. So heads are named once, when they are
saved (``save(model, folder, heads=["classifier"])``), and remembered with the model. Their names are their paths,
``classifier.kernel``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from flix.backends.jax.adapt import put_state
from flix.backends.jax.layers import FlixParam, adaptable, kernel_of
from flix.backends.jax.stacks import places
from flix.core.adapter.described import Head
from flix.core.adapter.heads import Place, as_heads

M = TypeVar("M")


def base_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """Every parameter but the features'; a shared one once. Banks have none."""
    if isinstance(model, nnx.Module):
        for path, node in nnx.iter_graph(model):
            if isinstance(node, nnx.Param) and not isinstance(node, FlixParam):
                yield ".".join(map(str, path)), node


def head_places(model: Any) -> dict[str, Place]:
    """The base's parameters by name, and the layers whose kernel each is."""
    kernels: dict[int, list[str]] = {}
    for path, place in places(model).items() if isinstance(model, nnx.Module) else ():
        kernel = None if adaptable(place.module)[0] is None else kernel_of(place.module)
        if isinstance(kernel, nnx.Variable):
            kernels.setdefault(id(kernel), []).append(path)
    return {
        name: Place(tuple(p[...].shape), kernels.get(id(p), ()), Head.holds(p[...].dtype))
        for name, p in base_parameters(model)
    }


def heads(model: Any, names: Collection[str] | None = None) -> dict[str, Head]:
    """Those that are named, or were before."""
    if not isinstance(model, nnx.Module):
        return {}
    state: Any = model.flix_state  # type: ignore[attr-defined]
    if names is not None:
        put_state(model, replace(state, heads=tuple(names)))
    known = dict(base_parameters(model))
    chosen = state.heads if names is None else names
    return as_heads(jax.device_get({name: known[name][...] for name in chosen}))


def put_heads(model: M, heads: Mapping[str, Head]) -> M:
    """Give parameters these values, in their places, and remember them."""
    known = dict(base_parameters(model))
    for name, head in heads.items():
        value = known[name][...]
        array = jnp.asarray(head.array(), value.dtype)
        known[name][...] = jax.device_put(array, value.sharding)
    state: Any = model.flix_state  # type: ignore[attr-defined]
    put_state(model, replace(state, heads=tuple({**dict.fromkeys(state.heads), **heads})))
    return model
