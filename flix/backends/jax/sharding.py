"""Sharded tables: A takes the kernel's input axis, B its output axis; slots are replicated, or spread over an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flix.backends.jax.parameters import Bank, LayerBank
from flix.core.errors import ConfigError


def partition_specs(
    bank: Bank,
    kernels: PartitionSpec | Mapping[str, PartitionSpec],
    *,
    features: str | None = None,
) -> dict[str, LayerBank]:
    """The PartitionSpecs of a bank, made from those of the kernels: A ``(features, in)``, B ``(features, out)``.

    Args:
        bank: ``{path: LayerBank}``.
        kernels: the spec of every kernel ``[d_in, d_out]``, or one by layer.
        features: an axis of the mesh, along which no kernel is sharded, over which to spread the slots of the tables;
            None keeps them whole on every device.

    Returns:
        The bank's structure with a PartitionSpec in place of each array.

    Raises:
        ConfigError: a layer without a spec, or with one that names the features' axis.
    """
    specs = {}
    for path, layer in bank.items():
        given = kernels if isinstance(kernels, PartitionSpec) else kernels.get(path)
        if given is None:
            raise ConfigError(
                f"partition_specs: layer {path!r} has no spec; give one by layer, or one for all"
            )
        into, out = (*given, None, None)[:2]
        if features is not None and features in jax.tree.leaves([into, out]):
            raise ConfigError(
                f"partition_specs: the kernel of layer {path!r} is sharded along {features!r}, {given}; give the features an "
                "axis of their own"
            )
        specs[path] = LayerBank(_spec(features, into), _spec(features, out), layer.spec)
    return specs


def shard(
    bank: Bank,
    mesh: jax.sharding.Mesh,
    kernels: PartitionSpec | Mapping[str, PartitionSpec],
    *,
    features: str | None = None,
) -> Bank:
    """Place a bank on a mesh of one or several processes, by :func:`partition_specs`.

    Raises:
        ConfigError: as for that function; and slots that the features' axis cannot divide equally.
    """
    specs = partition_specs(bank, kernels, features=features)
    if features is not None:
        for path, layer in bank.items():
            check_slots(path, layer.spec.rows, mesh, features)
    placed: Bank = jax.tree.map(
        lambda table, spec: jax.device_put(table, NamedSharding(mesh, spec)), bank, specs
    )
    return placed


def check_slots(path: str, rows: int, mesh: jax.sharding.Mesh, axis: str) -> None:
    """Refuse tables that cannot be cut into equal parts along an axis of a mesh.

    Raises:
        ConfigError: they cannot.
    """
    if axis not in mesh.shape:
        raise ConfigError(f"the mesh has no axis {axis!r}; it has {[*mesh.shape]}")
    if rows % (count := mesh.shape[axis]):
        raise ConfigError(
            f"layer {path!r} has {rows} slots (the sum of its features' ranks), which {count} devices along {axis!r} cannot "
            "share equally; choose ranks whose sum is a multiple of that"
        )


def left_to_compiler(compute: Callable[..., Any], like: Any, *args: Any) -> Any:
    """``compute(*args)``; in a mesh of explicit axes, with the sharding of what is inside left to the compiler.

    Args:
        compute: a function of arrays that gives one array.
        like: an array whose sharding the result takes, dimension by dimension; None to replicate it.
        args: its arguments.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return compute(*args)
    spec = _spec() if like is None else jax.typeof(like).sharding.spec
    return jax.sharding.auto_axes(compute, out_sharding=spec)(*args)


def partitioned(*arrays: Array) -> bool:
    """Whether the compiler is to split one of these over devices: not what is one device's own in a ``shard_map``."""
    meshes = [getattr(jax.typeof(array).sharding, "mesh", None) for array in arrays]
    return any(
        size > 1 and kind != AxisType.Manual
        for mesh in meshes
        if mesh is not None and not mesh.empty
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )


def like_kernel(table: Array, kernel: Any, axes: tuple[int, ...]) -> tuple[Array, dict[str, Any]]:
    """A table ``[..., P, d]``, placed as the kernel's axes that make up d, and its Variable's sharding metadata.

    Of several kernel axes, flattened into d, the first may be sharded; otherwise the table is replicated. Axes in
    front, of layers that are stacked, are placed as the kernel's.

    Args:
        table: the values.
        kernel: the Variable of the kernel.
        axes: the kernel's axes, without those in front.
    """
    metadata: dict[str, Any] = {}
    lead = table.ndim - 2
    axes = tuple(axis + lead for axis in axes)
    names = kernel.get_metadata().get("out_sharding")
    if names is not None:
        metadata["out_sharding"] = _axes(tuple(names), lead, axes)
        found = kernel.get_metadata()
        metadata |= {k: found[k] for k in ("mesh", "sharding_rules") if found.get(k) is not None}
    value = kernel.get_raw_value()
    sharding = None if isinstance(value, jax.core.Tracer) else getattr(value, "sharding", None)
    if isinstance(sharding, NamedSharding):
        spec = _spec(*_axes(tuple(sharding.spec), lead, axes))
        table = jax.device_put(table, NamedSharding(sharding.mesh, spec))
    elif sharding and len(sharding.device_set) == 1 and not isinstance(table, jax.core.Tracer):
        table = jax.device_put(table, sharding)
    return table, metadata


def _spec(*axes: Any) -> Any:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]


def _axes(spec: tuple[Any, ...], lead: int, axes: tuple[int, ...]) -> tuple[Any, ...]:
    front = (*spec, *[None] * lead)[:lead]
    return (*front, None, _along(spec, axes))


def _along(spec: tuple[Any, ...], axes: tuple[int, ...]) -> Any:
    padded = (*spec, *([None] * (max(axes) + 1)))
    inner = [padded[axis] for axis in axes[1:]]
    return padded[axes[0]] if all(name is None for name in inner) else None
