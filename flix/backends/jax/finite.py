"""Features whose values are not finite, named in a warning once, where values can be looked at.

A table is looked at once, as long as it lives: arrays do not change. While a function is traced its arguments have no
values yet; there the layers of a model that does not train are looked at where it is handed in.
"""

from __future__ import annotations

import math
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flix.backends import messages
from flix.backends.jax.parameters import LayerSpec
from flix.core.features.names import Feature, written


@dataclass(eq=False)
class _Look:
    """What was found in a layer's tables: the features that are not finite, and those that were named."""

    tables: tuple[weakref.ref[Array], ...]
    broken: frozenset[int]
    named: set[Feature] = field(default_factory=set)


_looks: dict[tuple[int, int], _Look] = {}
_settled: weakref.WeakSet[Any] = weakref.WeakSet()
"""The layers that were looked at on their way into a compiled function."""


def name_broken(
    spec: LayerSpec, a: Any, b: Any, ids: Any = None, named: set[Feature] | None = None
) -> bool:
    """Warn of the features of a batch whose values are not finite.

    Args:
        spec, a, b: the layer's; nothing happens where the tables are traced.
        ids: the batch's; None or traced ones for all features.
        named: those that a warning has named; default: of these tables.

    Returns:
        Whether the values could be looked at.
    """
    if not (_known(a) and _known(b)):
        return False
    look = _looks.get((id(a), id(b)))
    if look is None or look.tables[0]() is not a or look.tables[1]() is not b:
        look = _look(spec, a, b)
    if not look.broken:
        return True
    found = look.broken
    if ids is not None and not isinstance(ids, jax.core.Tracer):
        found = found & {*np.unique(np.asarray(ids)).tolist()}
    named, features = look.named if named is None else named, spec.registry.features
    if fresh := [features[i] for i in sorted(found) if features[i] not in named]:
        named.update(fresh)
        warnings.warn(messages.not_finite([written(feature) for feature in fresh]), stacklevel=2)
    return True


def look_at(layer: Any) -> None:
    """Look at the layer of a model on its way into a compiled function, once after it trained.

    A look at every call would wait for the device.
    """
    if not layer.deterministic:
        _settled.discard(layer)
    elif layer not in _settled:
        state, a, b = layer.flix_state, layer.flix_A[...], layer.flix_B[...]
        if name_broken(layer.flix_spec, a, b, None, state.named):
            _settled.add(layer)


def look_again(layer: Any) -> None:
    """Have a layer looked at again, whose values were changed."""
    _settled.discard(layer)


def _known(table: Any) -> bool:
    return (
        isinstance(table, jax.Array)
        and not isinstance(table, jax.core.Tracer)
        and table.is_fully_addressable
        and not table.is_deleted()
    )


def _look(spec: LayerSpec, a: Array, b: Array) -> _Look:
    broken = frozenset[int]()
    with jax.ensure_compile_time_eval():
        sums = [jnp.sum(t, dtype=jnp.promote_types(t.dtype, jnp.float32)) for t in (a, b)]
        if a.shape[-2] == spec.rows and not all(math.isfinite(s) for s in jax.device_get(sums)):
            sound = np.isfinite(np.asarray(a)).all(-1) & np.isfinite(np.asarray(b)).all(-1)
            sound = sound.reshape(-1, spec.rows).all(0)  # of all layers of a stack
            broken = frozenset(spec.owners[~sound].tolist())
    key = id(a), id(b)

    def forget(_: Any) -> None:
        _looks.pop(key, None)

    look = _looks[key] = _Look(tuple(weakref.ref(t, forget) for t in (a, b)), broken)
    return look
