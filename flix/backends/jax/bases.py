"""The base that a model's adapter is trained on, as files know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from flix.backends.jax.layers import form_of, kernel_of
from flix.backends.jax.stacks import places as places_of
from flix.core.adapter.base import Places


def base_name(model: Any) -> tuple[str | None, str | None]:
    """nnx models have none."""
    return None, None


def kernel_samples(model: Any, places: Mapping[str, Places]) -> dict[str, NDArray[Any]] | None:
    """Values of kernels; None of banks, which have none, and where one is on devices of other processes."""
    if not isinstance(model, nnx.Module):
        return None
    modules, found = places_of(model), {}
    for path, where in places.items():
        place = modules[path]
        if not isinstance(held := kernel_of(place.module), nnx.Variable):
            return None
        kernel = held[...]
        if not jnp.issubdtype(kernel.dtype, jnp.floating) or not kernel.is_fully_addressable:
            return None
        index = form_of(place.module).at(where.rows, where.columns)
        local = np.asarray(kernel) if kernel.size < 1 << 20 else kernel
        found[path] = np.asarray(local[(*place.index, *index)], np.float64)
    return found
