"""Saving and loading adapters (docs/specification.md §4.2): one file for every backend."""

from __future__ import annotations

from typing import Any, TypeVar, Union

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from flix.backends.jax.bank import Bank, LayerBank, LayerSpec, make_spec, pack
from flix.backends.jax.model import (
    attach_layers,
    flix_layers,
    layer_shapes,
    require_adapted,
    set_config,
)
from flix.core.adapter.adapter import Adapter, Rename, tensor_name
from flix.core.adapter.compatibility import check_fits, check_same
from flix.core.adapter.files import load_adapter, save_adapter
from flix.core.adapter.sharing import select_features
from flix.core.config.config import FlixConfig
from flix.core.errors import TargetError
from flix.core.files import Path_

Model = TypeVar("Model", bound=nnx.Module)
Source = Union[nnx.Module, tuple[FlixConfig, Bank]]


def config_and_bank(source: Source, what: str) -> tuple[FlixConfig, Bank]:
    """The configuration and the bank of an adapted model, or of ``(config, bank)``.

    Raises:
        TargetError: neither.
    """
    if (
        isinstance(source, tuple)
        and len(source) == 2
        and isinstance(source[0], FlixConfig)
        and isinstance(source[1], dict)
        and all(isinstance(layer, LayerBank) for layer in source[1].values())
    ):
        return source
    if not isinstance(source, nnx.Module):
        raise TargetError(
            f"{what} takes an adapted nnx model or (config, bank), got {type(source).__name__}"
        )
    config = require_adapted(source, what)
    return config, {path: layer.bank for path, layer in flix_layers(source)}


def to_adapter(source: Source) -> Adapter:
    """An adapted model's features, or those of ``(config, bank)``, as a numpy :class:`flix.Adapter`; values are copied.

    Raises:
        TargetError: the model is not adapted.
    """
    config, bank = config_and_bank(source, "to_adapter")
    layers = {path: layer.spec.shape for path, layer in bank.items()}
    tensors = {}
    for path, layer in bank.items():
        a, b = _whole(layer.A), _whole(layer.B)
        for feature, rank in zip(config.registry.features, layer.spec.layout.ranks, strict=True):
            if rank:
                rows = layer.spec.row_range(feature)
                tensors[tensor_name(path, "A", feature)] = a[rows].copy()
                tensors[tensor_name(path, "B", feature)] = np.ascontiguousarray(b[rows].T)
    return Adapter(config, layers, tensors)


def _whole(table: Array) -> NDArray[Any]:
    """A table's values on the host, gathered if it is sharded; halves as float32."""
    if table.dtype in (jnp.bfloat16, jnp.float16):
        table = table.astype(jnp.float32)
    return np.asarray(table)


def save(source: Source, directory: Path_, features: Any = None) -> None:
    """Write the adapter of a model, or of ``(config, bank)``, as a folder (the base is not written).

    Args:
        source: an adapted model, or ``(config, bank)``.
        directory: the folder.
        features: ``[(group, name), ...]`` or ``{group: name or names}``: these alone, and what they imply; default:
            all. ``load_features`` takes them into another model.

    Raises:
        FeatureError: an unknown feature.
        TargetError: the model is not adapted.
        AdapterError: the path is a file.
    """
    adapter = to_adapter(source)
    save_adapter(adapter if features is None else select_features(adapter, features), directory)


def load(model: Model, directory: Path_, rename: Rename = None, *, strategy: str = "auto") -> Model:
    """Load an adapter into an nnx model, in place.

    A plain model is adapted with the file's configuration; an adapted one must have the same layers, features and
    ranks, and gets the file's values. For a bank, see :func:`load_bank`.

    Args:
        model: a plain or adapted model.
        directory: the adapter's folder.
        rename: translates the file's layer paths to the model's.
        strategy: as for ``adapt``, for a plain model.

    Returns:
        The same model.

    Raises:
        AdapterError: a damaged file, or one for another architecture (the first mismatching layer is named).
    """
    return load_into(model, load_adapter(directory, rename), strategy=strategy)


def load_into(model: Model, adapter: Adapter, *, strategy: str = "auto") -> Model:
    """Put a numpy adapter into a model; otherwise as :func:`load`."""
    check_fits(adapter, layer_shapes(model))
    present = dict(flix_layers(model))
    if not present:
        attach_layers(model, adapter.config, list(adapter.layers), strategy)
        present = dict(flix_layers(model))
    layouts = {path: layer.flix_spec.layout for path, layer in present.items()}
    check_same(adapter, require_adapted(model, "load"), layouts)
    set_config(model, adapter.config)
    for layer in present.values():
        bank = _layer_of(adapter, layer.flix_spec, layer.flix_A[...].dtype)
        layer.flix_A[...] = jnp.asarray(bank.A, device=layer.flix_A[...].sharding)
        layer.flix_B[...] = jnp.asarray(bank.B, device=layer.flix_B[...].sharding)
    return model


def to_bank(adapter: Adapter, *, dtype: Any = jnp.float32) -> tuple[FlixConfig, Bank]:
    """A numpy adapter as a configuration and a bank."""
    bank = {
        path: _layer_of(adapter, make_spec(adapter.config, path, shape), dtype)
        for path, shape in adapter.layers.items()
    }
    return adapter.config, bank


def load_bank(
    directory: Path_, rename: Rename = None, *, dtype: Any = jnp.float32
) -> tuple[FlixConfig, Bank]:
    """Read an adapter's folder as ``(config, bank)``, for the functional core.

    Args:
        directory: the adapter's folder.
        rename: translates the file's layer paths.
        dtype: of the pairs.

    Raises:
        AdapterError: a damaged file.
    """
    return to_bank(load_adapter(directory, rename), dtype=dtype)


def _layer_of(adapter: Adapter, spec: LayerSpec, dtype: Any) -> LayerBank:
    features = adapter.config.registry.live
    return pack(spec, {f: adapter.pair(spec.path, f) for f in features}, dtype)
