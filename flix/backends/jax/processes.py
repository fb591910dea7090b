"""Several processes of ``jax.distributed``: they agree at the start, read what is spread over them, and one writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flix._version import __version__
from flix.backends.jax.adapt import flix_layers, require_adapted
from flix.backends.jax.layers import FlixParam
from flix.backends.jax.sharding import check_slots
from flix.core.config.agreeing import digest, disagreement
from flix.core.errors import AdapterError, ConfigError

_SAID = 1024
"""Bytes of what the first process says of a failure."""


def described(model: Any) -> dict[str, Any]:
    """What all processes must have in common, in plain data."""
    layers, base, frozen = dict[str, Any](), dict[str, Any](), set[str]()
    for path, layer in flix_layers(model):
        spec, registry = layer.flix_spec, layer.flix_spec.registry
        shape = spec.shape
        layers[path] = [shape.kind, shape.d_in, shape.d_out, str(layer.flix_A.dtype), *spec.stack]
        frozen |= {"=".join(registry.features[i]) for i in spec.frozen}
    parameters = nnx.state(model, nnx.All(nnx.Param, nnx.Not(FlixParam)))
    for keys, value in nnx.to_flat_state(parameters):
        base[".".join(map(str, keys))] = [*value.shape]
    return {
        "flix": __version__,
        "model": type(model).__name__,
        **model.flix_config.to_dict(),
        "layers": layers,
        "frozen features": sorted(frozen),
        "base": base,
    }


def check_processes(model: Any) -> None:
    """Check that all processes of ``jax.distributed`` train the same; each calls this before the first step.

    It compares the registry, the configuration, the adapted layers, the frozen features, and the base's parameters by
    name and shape. The processes exchange digests of 32 bytes, and everything else only if these differ. A single
    process checks nothing.

    Args:
        model: an adapted nnx model.

    Raises:
        ConfigError: the processes differ; raised in every process, with the differences and the processes named.
        TargetError: the model is not adapted.
    """
    require_adapted(model, "check_processes")
    if jax.process_count() == 1:
        return
    own = described(model)
    digests = _everywhere(np.frombuffer(digest(own), np.uint8))
    if (digests == digests[0]).all():
        return
    raise ConfigError(
        f"the processes do not train the same: {disagreement(_texts(own))}. Give every process the same model, "
        "configuration and frozen features before the first step"
    )


def _texts(own: Mapping[str, Any]) -> list[Any]:
    """What every process says, in all of them."""
    text = np.frombuffer(json.dumps(own).encode(), np.uint8)
    lengths = _everywhere(np.asarray([len(text)], np.int32))[:, 0]
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = zip(_everywhere(padded), lengths, strict=True)
    return [json.loads(bytes(row[:length]).decode()) for row, length in rows]


def _everywhere(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The arrays of all processes, of one shape, by rank."""
    return np.asarray(multihost_utils.process_allgather(value)).reshape(-1, *value.shape)


def on_host(tree: Any) -> Any:
    """Arrays on the host, whole; what is spread over processes is gathered, which all of them must ask for."""

    def whole(value: Any) -> Any:
        if not _spread(value) or value.is_fully_replicated:
            return value
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))

    return jax.device_get(jax.tree.map(whole, tree))  # in one transfer


def _spread(value: Any) -> bool:
    return isinstance(value, jax.Array) and not value.is_fully_addressable


@contextmanager
def writing(model: Any) -> Iterator[bool]:
    """See :class:`flix.backends.protocol.SupportsProcesses`: of spread arrays the first process writes."""
    tables = nnx.state(model, FlixParam) if isinstance(model, nnx.Module) else model
    if not any(map(_spread, jax.tree.leaves(tables))):
        yield True
        return
    failed: Exception | None = None
    try:
        yield jax.process_index() == 0
    except Exception as error:
        failed = error
    said = np.zeros(_SAID, np.uint8)
    if failed is not None:
        text = f"{type(failed).__name__}: {failed}".encode()[:_SAID]
        said[: len(text)] = np.frombuffer(text, np.uint8)
    told = _everywhere(said)[0]
    if failed is not None:
        raise failed
    if told.any():
        text = bytes(told).rstrip(b"\0")
        shown = text.decode(errors="replace")
        raise AdapterError(f"the first process, which writes for all, could not: {shown}")


def shard_features(model: Any, mesh: Mesh, axis: str) -> Any:
    """Spread the features of an adapted nnx model over an axis of a mesh; each device holds 1/n of the slots.

    The axis may also be used for something else, as long as no table is sharded along it. The placement of a table
    along its other axis (:func:`shard`, or by its kernel) stays. An optimizer that you make afterwards keeps its
    state in the same places. Sums are those of whole tables; the compiler gathers the rows that a batch uses. Call it
    again after features were added or removed.

    Args:
        model: an adapted nnx model; it is changed in place.
        mesh: the mesh of its kernels, of one or several processes.
        axis: the axis.

    Returns:
        The model.

    Raises:
        ConfigError: no such axis; a layer whose number of slots is not a multiple of its size, or that is on another
            mesh.
        TargetError: the model is not adapted.
    """
    require_adapted(model, "shard_features")
    placed = []
    for path, layer in flix_layers(model):
        check_slots(path, layer.flix_spec.rows, mesh, axis)
        for variable in (layer.flix_A, layer.flix_B):
            table = variable[...]
            names = [None] * table.ndim
            if isinstance(table.sharding, NamedSharding):
                if table.sharding.mesh != mesh and table.sharding.mesh.size > 1:
                    raise ConfigError(
                        f"shard_features: the kernel of layer {path!r} lies on another mesh, {table.sharding.mesh.shape}; "
                        "give that one, with an axis for the features"
                    )
                given: Any = tuple(table.sharding.spec)
                names[: len(given)] = given
            if axis in jax.tree.leaves(names[-1:]):
                raise ConfigError(
                    f"shard_features: the tables of layer {path!r} are sharded along {axis!r} already, by their kernel's "
                    "axis; give the features an axis of their own"
                )
            names[-2] = axis  # type: ignore[call-overload]
            placed.append((variable, NamedSharding(mesh, PartitionSpec(*names))))  # type: ignore[no-untyped-call]
    for variable, sharding in placed:
        variable[...] = jax.device_put(variable[...], sharding)
    return model
