"""No adapted layer that never acts (docs/specification.md §5.1.9): models that read a kernel and skip its layer.

While a routed model is called, its layers say that they ran, and that their kernels were asked for. A layer whose
kernel alone was asked for is looked into: the call is traced once more, with that kernel as an argument, and what
computes with it shows. A look at a kernel's dtype or shape is none of these. Embeddings are not watched: who reads
their table is mostly a tied head, which keeps the base's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from flix.backends import messages
from flix.backends.jax import scopes
from flix.backends.jax.routing import current


class Watch:
    """What a call does with the adapted layers of a model.

    Attributes:
        state: the model's.
        read: paths of layers whose kernels were asked for, and whether these trained.
    """

    def __init__(self, state: Any) -> None:
        self.state = state
        self.read: set[tuple[str, bool]] = set()


_watch: ContextVar[Watch | None] = ContextVar("flix_watch", default=None)


class Kernel:
    """The attribute of an adapted layer that holds its kernel: it says when it is asked for."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        if layer is None:
            return self
        if (watch := _watch.get()) is not None and watch.state == layer.flix_state:
            watch.read.add(_key(layer))
        try:
            return vars(layer)[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)[self.name] = value

    def __delete__(self, layer: Any) -> None:
        del vars(layer)[self.name]


def _key(layer: Any) -> tuple[str, bool]:
    return layer.flix_spec.path, bool(layer.deterministic)


def ran(layer: Any) -> None:
    """Note that a layer runs."""
    layer.flix_state.acted.add(_key(layer))


def run(model: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A model's forward under the routing in force, watched.

    Raises:
        TargetError: adapted layers whose kernels the model uses without calling them.
    """
    if _watch.get() is not None:
        return forward(model, *args, **kwargs)
    watch = Watch(model.flix_state)
    token = _watch.set(watch)
    try:
        result = forward(model, *args, **kwargs)
    finally:
        _watch.reset(token)
    if (left := watch.read - model.flix_state.acted) and (
        found := _used(model, forward, args, kwargs, {path for path, _ in left})
    ):
        raise messages.bypassed(found)
    return result


def _used(
    model: Any, forward: Callable[..., Any], args: Any, kwargs: Any, paths: set[str]
) -> list[str]:
    """Which of some layers' kernels a forward computes with, by tracing it for a copy of the model."""
    graph, state = nnx.split(model)
    routing = current.routing

    def layers(model: Any) -> dict[str, Any]:
        specs = ((vars(layer).get("flix_spec"), layer) for _, layer in nnx.iter_modules(model))
        return {spec.path: layer for spec, layer in specs if spec and spec.path in paths}

    def call(kernels: dict[str, Any]) -> list[Any]:
        copy = nnx.merge(graph, state, copy=True)
        for path, layer in layers(copy).items():
            layer.kernel.set_value(kernels[path])
        with current.under(routing=replace(routing, frame=scopes.frame())):
            out = forward(copy, *args, **kwargs)
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    kernels = {path: layer.kernel[...] for path, layer in layers(model).items()}
    try:
        traced = jax.make_jaxpr(call)(kernels).jaxpr
    except jax.errors.JAXTypeError:
        return [*kernels]  # its values are looked at
    inputs = {id(v) for equation in traced.eqns for v in equation.invars}
    inputs |= {id(v) for v in traced.outvars}
    names = sorted(kernels)  # as the trace has them
    return [path for path, v in zip(names, traced.invars, strict=True) if id(v) in inputs]
