"""Low-rank pairs as pytrees: a packed pair of tables a layer, what is static as metadata (docs/specification.md §5.3).

All features' A are stacked in the order of their ids into one table ``A [P, d_in]``, and their B, transposed, into
``B [P, d_out]``, where P is the sum of the ranks. Gathering a batch's rows then costs what the batch uses, however many
features are registered. Ranks, scales and names are metadata of the pytree: one compiled function serves every routing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from flix.core.adapter.adapter import LayerShape
from flix.core.adapter.initial import initial_a
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
        for feature, rank in zip(self.spec.registry.features, self.spec.layout.ranks, strict=True):
            if rank:
                yield feature, *self.pair(*feature)


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


def make_spec(
    config: FlixConfig, path: str, shape: LayerShape, frozen: frozenset[int] = frozenset()
) -> LayerSpec:
    """The spec of one layer under a configuration."""
    return LayerSpec(path, shape, config.layout(path), config.registry, frozen)


def layer_shape(path: str, sizes: Sizes) -> LayerShape:
    """Sizes as users give them, ``(d_in, d_out)`` or ``(d_in, d_out, "embedding")``, as a LayerShape.

    Raises:
        TargetError: another form.
    """
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


def initial_layer(spec: LayerSpec, seed: int, dtype: Any = jnp.float32) -> LayerBank:
    """Initial values (:mod:`flix.core.adapter.initial`): A uniform, B zero; the same bytes in every backend."""
    a = np.zeros((spec.rows, spec.shape.d_in), np.float32)
    for (group, name), start, rank in zip(
        spec.registry.features, spec.starts, spec.ranks, strict=True
    ):
        if rank:
            a[start : start + rank] = initial_a(
                seed=seed,
                layer=spec.path,
                group=group,
                feature=name,
                rank=int(rank),
                d_in=spec.shape.d_in,
            )
    b = np.zeros((spec.rows, spec.shape.d_out), np.float32)
    return LayerBank(jnp.asarray(a, dtype), jnp.asarray(b, dtype), spec)


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
    return {
        path: initial_layer(
            make_spec(config, path, layer_shape(path, sizes)), config.seed, jnp.dtype(dtype)
        )
        for path, sizes in layers.items()
    }


def pack(
    spec: LayerSpec, pairs: Mapping[Feature, tuple[Any, Any]], dtype: Any = jnp.float32
) -> LayerBank:
    """A bank of one layer from A_f ``[r, d_in]`` and B_f ``[d_out, r]`` of each feature with an update."""
    features = [f for f, r in zip(spec.registry.features, spec.layout.ranks, strict=True) if r]
    a = [np.asarray(pairs[f][0]) for f in features]
    b = [np.asarray(pairs[f][1]).T for f in features]
    empty_a, empty_b = np.zeros((0, spec.shape.d_in)), np.zeros((0, spec.shape.d_out))
    return LayerBank(
        jnp.asarray(np.concatenate([empty_a, *a]), dtype),
        jnp.asarray(np.concatenate([empty_b, *b]), dtype),
        spec,
    )


def host_pairs(layer: LayerBank) -> dict[Feature, tuple[NDArray[Any], NDArray[Any]]]:
    """A_f ``[r, d_in]`` and B_f ``[d_out, r]`` of every feature with an update, on the host.

    Cut there, since slices on a device are compiled for every rank.
    """
    a, b = np.asarray(layer.A), np.asarray(layer.B)
    spec = layer.spec
    return {
        feature: (a[start : start + rank], b[start : start + rank].T)
        for feature, start, rank in zip(
            spec.registry.features, spec.starts, spec.ranks, strict=True
        )
        if rank
    }
