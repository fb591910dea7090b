"""Low-rank pairs as pytrees: a packed pair of tables a layer, what is static as metadata (docs/specification.md §5.3).

All features' A are stacked in the order of their ids into one table ``A [P, d_in]``, and their B, transposed, into
``B [P, d_out]``, where P is the sum of the ranks. Gathering a batch's rows then costs what the batch uses, however many
features are registered. Ranks, scales and names are metadata of the pytree: one compiled function serves every routing.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from flix.backends import messages
from flix.core.adapter.adapter import LayerShape, Sizes
from flix.core.adapter.changes import Change, fresh_pairs
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.errors import ConfigError
from flix.core.features.registry import Feature, FeatureRegistry


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """The static facts about an adapted layer. Compared by value and hashed once; part of every jit cache key.

    Attributes:
        path: the layer's path.
        shape: its kind and sizes.
        layout: ranks and scales of all features, by id.
        registry: the features.
        frozen: ids of features that do not train.
        lead: for stacked layers, the sizes of the axes in front of the tables; else empty.
        stack: the paths of these layers, in the order of the axes.
    """

    path: str
    shape: LayerShape
    layout: LayerLayout
    registry: FeatureRegistry
    frozen: frozenset[int] = frozenset()
    lead: tuple[int, ...] = ()
    stack: tuple[str, ...] = ()

    def _key(self) -> tuple[Any, ...]:
        return (
            self.path,
            self.shape,
            self.layout,
            self.frozen,
            self.lead,
            self.stack,
            self.registry,
        )

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, LayerSpec) and self._key() == other._key())

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.path, self.shape, self.layout, self.frozen, self.stack))

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: Any) -> LayerSpec:
        return self

    @property
    def ranks(self) -> NDArray[np.int32]:
        """int32 ``[F]``."""
        return self.layout.lengths[:-1]

    @property
    def starts(self) -> NDArray[np.int32]:
        """The first row of each feature in the tables: int32 ``[F]``."""
        return self.layout.starts[:-1]

    @property
    def scales(self) -> NDArray[np.float64]:
        """s_f: float64 ``[F]``."""
        return self.layout.arrays()[1][:-1]

    @functools.cached_property
    def owners(self) -> NDArray[np.int32]:
        """The feature of each row of the tables: int32 ``[P]``."""
        return np.repeat(np.arange(len(self.ranks), dtype=np.int32), self.ranks)

    @functools.cached_property
    def trainable(self) -> NDArray[np.bool_]:
        """Which features train: bool ``[F]``."""
        flags = np.ones(len(self.ranks), dtype=bool)
        flags[list(self.frozen)] = False
        return flags

    @functools.cached_property
    def removed(self) -> NDArray[np.int32]:
        """Ids of features that were removed, which no routing may name: int32."""
        return np.asarray(self.registry.removed_ids, np.int32)

    @property
    def rows(self) -> int:
        """P, the number of rows of the tables."""
        return self.layout.rows

    @property
    def widest(self) -> int:
        """The largest rank."""
        return self.layout.widest

    def row_range(self, feature: Feature) -> slice:
        """The range of a feature's rows in the tables."""
        return self.layout.span(self.registry.id(*feature))

    def pairs(
        self, a: Any, b: Any, features: Iterable[Feature] | None = None
    ) -> dict[Feature, Any]:
        """(A_f, B_f) of some features (default: all) as slices of tables, without features of rank 0."""
        registry = self.registry
        ids = None if features is None else [registry.id(*feature) for feature in features]
        return {registry.features[i]: pair for i, pair in self.layout.pairs(a, b, ids).items()}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["A", "B"], meta_fields=["spec"])
@dataclass(frozen=True)
class LayerBank:
    """The pairs of all features in one layer: a pytree of two arrays.

    Attributes:
        A: ``[P, d_in]``, A_f of every feature, stacked in the order of the ids.
        B: ``[P, d_out]``, B_f transposed, stacked in the same way.
        spec: the static facts.
    """

    A: Array
    B: Array
    spec: LayerSpec

    def pair(self, group: str, name: str) -> tuple[Array, Array]:
        """A_f ``[r, d_in]`` and B_f ``[d_out, r]`` of a feature.

        Raises:
            FeatureError: no such feature.
        """
        rows = self.spec.row_range((group, name))
        return self.A[rows], self.B[rows].T

    def pairs(self) -> Iterator[tuple[Feature, Array, Array]]:
        """(feature, A_f, B_f) of every feature with an update in this layer."""
        for feature in self.spec.registry.live:  # one by one: slices of device arrays are copies
            for a, b in self.spec.pairs(self.A, self.B, [feature]).values():
                yield feature, a, b


@functools.partial(jax.tree_util.register_dataclass, data_fields=["A", "B"], meta_fields=["spec"])
@dataclass(frozen=True)
class LayerRows:
    """The rows of a batch's features, gathered from a :class:`LayerBank`, for differentiation.

    Attributes:
        A: ``[U * R, d_in]`` for U features and the layer's largest rank R; rows above a feature's rank are zero.
        B: ``[U * R, d_out]``, in the same way.
        spec: the bank's.
    """

    A: Array
    B: Array
    spec: LayerSpec


Bank = dict[str, LayerBank]
Rows = dict[str, LayerRows]


def make_specs(
    config: FlixConfig, shapes: Mapping[str, LayerShape], frozen: frozenset[int] = frozenset()
) -> dict[str, LayerSpec]:
    """The specs of layers under a configuration; equal layouts are one object."""
    return {
        path: LayerSpec(path, shapes[path], layout, config.registry, frozen)
        for path, layout in config.layouts(shapes).items()
    }


def init(config: FlixConfig, layers: Mapping[str, Sizes], *, dtype: Any = jnp.float32) -> Bank:
    """The bank of a model: initial pairs of every feature in every layer.

    Args:
        config: the configuration; its targets are ignored, because the layers are given.
        layers: ``{path: (d_in, d_out)}``; ``(vocabulary, d_out, "embedding")`` for embeddings.
        dtype: the dtype of the pairs.

    Returns:
        ``{path: LayerBank}``, a pytree of arrays.

    Raises:
        ConfigError, TargetError: a configuration or sizes of another form.
    """
    if not isinstance(config, FlixConfig):
        raise ConfigError(f"init needs a FlixConfig, got {type(config).__name__}")
    shapes = {path: LayerShape.of(path, sizes) for path, sizes in layers.items()}
    if stacked := [path for path, shape in shapes.items() if shape.experts]:
        raise messages.no_experts(stacked)
    return {
        path: pack(spec, fresh_pairs(config, path, spec.shape), dtype)
        for path, spec in make_specs(config, shapes).items()
    }


def pack(
    spec: LayerSpec,
    pairs: Mapping[Feature, tuple[Any, Any]],
    dtype: Any = jnp.float32,
    before: LayerBank | None = None,
    kept: Collection[int] = (),
) -> LayerBank:
    """The tables of one layer, filled on the host: slices on a device would be compiled for every rank.

    Args:
        spec: the layer's.
        pairs: A_f ``[r, d_in]`` and B_f ``[d_out, r]`` of each feature with an update that is not kept.
        dtype: of the tables.
        before: tables to take the kept features' rows from, and the mesh where they are on one.
        kept: ids of features that keep their rows, bit for bit.
    """
    sizes = spec.shape.d_in, spec.shape.d_out
    a, b = (np.empty((spec.rows, d), jnp.dtype(dtype)) for d in sizes)
    ids = np.asarray([*kept], np.int32)
    if before is not None and len(ids):
        old, new = np.isin(before.spec.owners, ids), np.isin(spec.owners, ids)
        a[new], b[new] = np.asarray(before.A)[old], np.asarray(before.B)[old]
    features, fresh = spec.registry.features, {*np.flatnonzero(spec.ranks).tolist()} - {*kept}
    spec.layout.put(a, b, {i: pairs[features[i]] for i in fresh})
    if before is None:
        return LayerBank(jnp.asarray(a), jnp.asarray(b), spec)
    return LayerBank(_placed(a, before.A), _placed(b, before.B), spec)


def _placed(table: NDArray[Any], like: Array) -> Array:
    on_mesh = isinstance(like.sharding, NamedSharding)
    placed: Array = jax.device_put(table, like.sharding) if on_mesh else jnp.asarray(table)
    return placed


def changed(bank: Bank, change: Change) -> Bank:
    """A bank with the features that the change says; layers whose values all stay keep their arrays."""
    # Ids do not change.
    kept = frozenset(change.config.registry.id(*feature) for feature in change.kept)
    shapes = {path: layer.spec.shape for path, layer in bank.items()}
    first = next(iter(bank.values()), None)
    result: Bank = {}
    for path, spec in make_specs(change.config, {**shapes, **change.layers}).items():
        layer, pairs = bank.get(path), change.pairs(path)
        if (like := layer or first) and like.spec.frozen:
            spec = replace(spec, frozen=like.spec.frozen & kept)
        if layer is None:
            result[path] = pack(spec, pairs, jnp.float32 if first is None else first.A.dtype)
        elif not pairs and np.array_equal(spec.owners, layer.spec.owners):
            result[path] = LayerBank(layer.A, layer.B, spec)
        else:
            result[path] = pack(spec, pairs, layer.A.dtype, layer, kept)
    return result
