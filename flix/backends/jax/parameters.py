"""Low-rank pairs as pytrees: a packed pair of tables a layer, what is static as metadata (docs/specification.md §5.3).

All features' A are stacked in the order of their ids into one table ``A [P, d_in]``, and their B, transposed, into
``B [P, d_out]``, where P is the sum of the ranks. Gathering a batch's rows then costs what the batch uses, however many
features are registered. Ranks, scales and names are metadata of the pytree: one compiled function serves every routing.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.changes import Change
from flix.core.adapter.initial import initial_pairs
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.errors import ConfigError, TargetError
from flix.core.features.registry import Feature, FeatureRegistry

KINDS = ("linear", "embedding")
Sizes = Union[LayerShape, Sequence[Any]]


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """What is fixed about an adapted layer. Compared by value, hashed once: it is part of every jit cache key.

    Attributes:
        path: the layer's path.
        shape: its kind and sizes.
        layout: ranks and scales of all features, by id.
        registry: the features.
        frozen: ids of features that do not train.
    """

    path: str
    shape: LayerShape
    layout: LayerLayout
    registry: FeatureRegistry
    frozen: frozenset[int] = frozenset()

    def _key(self) -> tuple[Any, ...]:
        return (self.path, self.shape, self.layout, self.frozen, self.registry)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, LayerSpec) and self._key() == other._key())

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.path, self.shape, self.layout, self.frozen))

    def __hash__(self) -> int:
        return self._hash

    def __deepcopy__(self, memo: Any) -> LayerSpec:
        return self

    @functools.cached_property
    def ranks(self) -> NDArray[np.int32]:
        """int32 ``[F]``."""
        return np.asarray(self.layout.ranks, np.int32)

    @functools.cached_property
    def starts(self) -> NDArray[np.int32]:
        """The first row of each feature in the tables: int32 ``[F]``."""
        return (np.cumsum(self.ranks) - self.ranks).astype(np.int32)

    @functools.cached_property
    def scales(self) -> NDArray[np.float64]:
        """s_f: float64 ``[F]``."""
        return np.asarray(self.layout.scales, np.float64)

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
        features = self.registry.features
        gone = [i for i, feature in enumerate(features) if feature in self.registry.removed]
        return np.asarray(gone, np.int32)

    @property
    def rows(self) -> int:
        """P, the rows of the tables."""
        return int(self.ranks.sum())

    @property
    def widest(self) -> int:
        """The largest rank."""
        return int(self.ranks.max(initial=0))

    def row_range(self, feature: Feature) -> slice:
        """Where a feature's rows stand in the tables."""
        i = self.registry.id(*feature)
        return slice(int(self.starts[i]), int(self.starts[i] + self.ranks[i]))

    def row_ranges(self) -> Iterator[tuple[Feature, slice]]:
        """The same of every feature with an update in this layer."""
        starts, ranks = self.starts.tolist(), self.layout.ranks
        for feature, start, rank in zip(self.registry.features, starts, ranks, strict=True):
            if rank:
                yield feature, slice(start, start + rank)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["A", "B"], meta_fields=["spec"])
@dataclass(frozen=True)
class LayerBank:
    """The pairs of all features in one layer: a pytree of two arrays.

    Attributes:
        A: ``[P, d_in]``, A_f of every feature, stacked in the order of the ids.
        B: ``[P, d_out]``, B_f transposed, stacked likewise.
        spec: what is fixed.
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
        for feature, rows in self.spec.row_ranges():
            yield feature, self.A[rows], self.B[rows].T


@functools.partial(jax.tree_util.register_dataclass, data_fields=["A", "B"], meta_fields=["spec"])
@dataclass(frozen=True)
class LayerRows:
    """The rows of a batch's features, gathered out of a :class:`LayerBank`: what gradients are taken with respect to.

    Attributes:
        A: ``[U * R, d_in]`` for U features and the layer's largest rank R; rows above a feature's rank are zero.
        B: ``[U * R, d_out]`` likewise.
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
    layouts: dict[LayerLayout, LayerLayout] = {}
    specs = {}
    for path, shape in shapes.items():
        layout = config.layout(path)
        layout = layouts.setdefault(layout, layout)
        specs[path] = LayerSpec(path, shape, layout, config.registry, frozen)
    return specs


def layer_shape(path: str, sizes: Sizes) -> LayerShape:
    """Sizes as users give them, ``(d_in, d_out)`` or ``(d_in, d_out, "embedding")``."""
    if isinstance(sizes, LayerShape):
        return sizes
    try:
        d_in, d_out, *rest = sizes
        kind = rest[0] if rest else "linear"
        if len(rest) <= 1 and kind in KINDS and int(d_in) >= 0 and int(d_out) >= 0:
            return LayerShape(int(d_in), int(d_out), kind)
    except (TypeError, ValueError):
        pass
    raise TargetError(
        f"layer {path!r}: sizes are (d_in, d_out) or (d_in, d_out, 'embedding'), got {sizes!r}"
    )


def init(config: FlixConfig, layers: Mapping[str, Sizes], *, dtype: Any = jnp.float32) -> Bank:
    """The bank of a model: initial pairs of every feature in every layer.

    Args:
        config: the configuration; its targets are not consulted, the layers are those given.
        layers: ``{path: (d_in, d_out)}``; ``(vocabulary, d_out, "embedding")`` for embeddings.
        dtype: of the pairs.

    Returns:
        ``{path: LayerBank}``, a pytree of arrays.

    Raises:
        ConfigError, TargetError: a configuration or sizes of another form.
    """
    if not isinstance(config, FlixConfig):
        raise ConfigError(f"init needs a FlixConfig, got {type(config).__name__}")
    bank = {}
    shapes = {path: layer_shape(path, sizes) for path, sizes in layers.items()}
    for path, spec in make_specs(config, shapes).items():
        ranks = dict(zip(spec.registry.features, spec.layout.ranks, strict=True))
        d_in, d_out = spec.shape.d_in, spec.shape.d_out
        pairs = initial_pairs(seed=config.seed, layer=path, ranks=ranks, d_in=d_in, d_out=d_out)
        bank[path] = pack(spec, pairs, dtype)
    return bank


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
    stay = {*ids.tolist()}
    for i, (feature, rows) in zip(
        np.flatnonzero(spec.ranks).tolist(), spec.row_ranges(), strict=True
    ):
        if i not in stay:
            a[rows], b[rows] = pairs[feature][0], np.asarray(pairs[feature][1]).T
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
