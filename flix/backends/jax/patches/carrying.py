"""Patch: what adapted models and layers show of themselves where flax and JAX flatten them.

What: in a forward a flattened module has one attribute more, its routing as arrays, and in a ``disable`` block another,
that it is disabled: so that ``nnx.jit``, ``nnx.remat``, ``nnx.scan`` and what else keys its cache on a module's content
tells calls apart, and the module inside acts as the one outside would (docs/specification.md §5.1.4). Nothing is set on
the module itself, which other threads may be calling. flax's own methods do the work; these add to what they return.
When: always; outside of forwards and blocks nothing is added.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from flix.backends.jax import scopes
from flix.backends.jax.routing import CARRIED, carried

_VIRTUAL = (CARRIED, scopes.MARK)
STATE = "flix_state"


class Carrying(nnx.Module):
    """Mixed in before the module's own class."""

    def _flix_virtual(self) -> tuple[Any, Any]:
        return carried(self), scopes.mark(self)

    def _graph_node_flatten(self) -> Any:
        nodes, metadata = super()._graph_node_flatten()  # type: ignore[no-untyped-call]
        routing, mark = self._flix_virtual()
        if routing is None and mark is None and not _has(self):
            return nodes, metadata
        kept = [(name, value) for name, value in nodes if name not in _VIRTUAL]
        plain = not self._pytree__is_pytree  # type: ignore[attr-defined]
        if routing is not None:
            kept.append((CARRIED, routing if plain else nnx.graphlib.DataElem(routing)))
        if mark is not None:
            kept.append((scopes.MARK, mark if plain else nnx.graphlib.StaticElem(mark)))
        return sorted(kept, key=lambda pair: str(pair[0])), metadata

    def _graph_node_clear(self) -> None:
        # An existing module that a transformation updates keeps what it had itself. Its state would become that of an
        # equal model, which the transformation's cache knows.
        own = {name: vars(self).get(name) for name in (*_VIRTUAL, STATE)}
        super()._graph_node_clear()  # type: ignore[no-untyped-call]
        vars(self).update(own)

    def _graph_node_init(self, attributes: Iterable[tuple[Any, Any]]) -> None:
        own = {name: vars(self)[name] for name in _VIRTUAL if name in vars(self)}
        state = vars(self).get(STATE)
        super()._graph_node_init(attributes)
        if state is not None and vars(self)[STATE] == state:
            vars(self)[STATE] = state
        for name, value in own.items():
            vars(self).pop(name, None) if value is None else vars(self).update({name: value})

    def _pytree__flatten(self) -> Any:
        nodes, static = super()._pytree__flatten()  # type: ignore[no-untyped-call]
        return self._flix_pytree(nodes, static, lambda value: value)

    def _pytree__flatten_with_paths(self) -> Any:
        nodes, static = super()._pytree__flatten_with_paths()  # type: ignore[no-untyped-call]
        key = jax.tree_util.GetAttrKey(CARRIED)
        return self._flix_pytree(nodes, static, lambda value: (key, value))

    def _flix_pytree(self, nodes: Any, static: Any, entry: Any) -> Any:
        routing, mark = self._flix_virtual()
        if routing is None and mark is None and not _has(self):
            return nodes, static
        names, fixed, values = static
        kept = [(n, v) for n, v in zip(names, nodes, strict=True) if n not in _VIRTUAL]
        still = [(n, v) for n, v in zip(fixed, values, strict=True) if n not in _VIRTUAL]
        if routing is not None:
            kept.append((CARRIED, entry(routing)))
        if mark is not None:
            still.append((scopes.MARK, mark))
        return [v for _, v in kept], (
            tuple(n for n, _ in kept),
            tuple(n for n, _ in still),
            tuple(v for _, v in still),
        )


def _has(module: Any) -> bool:
    return any(name in vars(module) for name in _VIRTUAL)
