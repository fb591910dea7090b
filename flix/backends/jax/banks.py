"""Banks without a model around them: out of adapters and files, and by themselves where a verb needs no more."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array

from flix.backends.jax import primitives, quantised
from flix.backends.jax.forms import FLOATS
from flix.backends.jax.merging import folded
from flix.backends.jax.parameters import Bank, make_specs, pack
from flix.backends.jax.quantised import Kernel
from flix.backends.verbs.shared import Shared, by_layer
from flix.core.adapter.adapter import Adapter, Rename
from flix.core.adapter.composition import delta
from flix.core.adapter.files import load_adapter
from flix.core.config.config import FlixConfig
from flix.core.errors import TargetError
from flix.core.features.encoding import Row
from flix.core.files import Path_

V = TypeVar("V", bound=Callable[..., Any])


def to_bank(adapter: Adapter, *, dtype: Any = jnp.float32) -> tuple[FlixConfig, Bank]:
    """A numpy adapter as a configuration and a bank."""
    config, pairs = adapter.config, by_layer(adapter)
    specs = make_specs(config, adapter.layers)
    return config, {path: pack(spec, pairs[path], dtype) for path, spec in specs.items()}


def load_bank(
    directory: Path_, rename: Rename = None, *, dtype: Any = jnp.float32
) -> tuple[FlixConfig, Bank]:
    """An adapter's folder as ``(config, bank)``, for the functional core; ``rename`` translates layer paths.

    Raises:
        AdapterError: a damaged file.
    """
    return to_bank(load_adapter(directory, rename), dtype=dtype)


def merge_kernels(
    config: FlixConfig,
    bank: Bank,
    kernels: Mapping[str, Kernel],
    row: Row,
    *,
    dequantize: bool = False,
) -> dict[str, Array]:
    """Kernels with one composition folded in, for the functional core.

    Args:
        config: the configuration.
        bank: ``{path: LayerBank}``.
        kernels: ``{path: kernel [d_in, d_out]}``; layers that are not adapted are returned unchanged.
        row: the composition.
        dequantize: turn kernels with a scale (:mod:`flix.backends.jax.quantised`) into plain ones in the scale's
            dtype.

    Raises:
        FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
        TargetError: an adapted layer without a kernel, or with a kernel of other sizes; a kernel that is quantised or
            a function.
    """
    active, adapter = Shared(primitives).composed("merge_kernels", (config, bank), row)
    result: dict[str, Any] = dict(kernels)
    for path, shape in adapter.layers.items():
        kernel = kernels.get(path)
        own = quantised.values_of(kernel, path)
        if own is None or tuple(own.shape) != (shape.d_in, shape.d_out):
            what = "none" if kernel is None else "a function"
            found = what if own is None else list(own.shape)
            raise TargetError(
                f"layer {path!r} needs a kernel [{shape.d_in}, {shape.d_out}], got {found}"
            )
        update = delta(adapter, path, active).T
        if isinstance(kernel, Mapping) and dequantize:
            whole = quantised.dequantised(kernel, path) + update
            result[path] = jnp.asarray(whole, jnp.asarray(kernel["scale"]).dtype)
        elif isinstance(kernel, Mapping) or str(own.dtype) not in FLOATS:
            raise TargetError(
                f"layer {path!r} cannot be merged: its kernel is quantised ({own.dtype}); pass "
                f"it with its scale and dequantize=True to get a plain kernel"
            )
        else:
            result[path] = folded(own, update)
    return result


def also_bare(verb: V) -> V:
    """A verb that needs the registry alone, for bare banks, too; of one comes a new one."""

    @functools.wraps(verb)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not primitives.is_bank(model) or not model:
            return verb(model, *args, **kwargs)
        config = FlixConfig(registry=next(iter(model.values())).spec.registry, ranks=0)
        return verb((config, model), *args, **kwargs)[1]

    return call  # type: ignore[return-value]
