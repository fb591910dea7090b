"""Adapters as data: a configuration, adapted layers, and the pairs of every feature, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter.described import Base, Head
from flix.core.config.config import FlixConfig
from flix.core.config.overrides import nested
from flix.core.config.targets import LayerInfo, exactly
from flix.core.errors import AdapterError, TargetError, listed, near
from flix.core.features.names import Feature, written

Pair = tuple[NDArray[Any], NDArray[Any]]
"""A ``[r, d_in]`` and B ``[d_out, r]`` of a feature in a layer; with E experts ``[E, r, d_in]``, ``[E, d_out, r]``."""

Rename = Union[Mapping[str, str], Callable[[str], str], None]
_ALLOWED = ("F16", "F32", "F64", "float16", "float32", "float64")


@dataclass(frozen=True)
class LayerShape:
    """An adapted layer's kind and sizes.

    Attributes:
        d_in: input size (of an embedding: the vocabulary's).
        d_out: output size.
        kind: ``"linear"`` or ``"embedding"``.
        experts: the number of linear maps that the layer is, E, if its kernel has an axis of experts; 0 if it has none.
        active: how many of them a token is sent to. Costs are counted by it; it is no part of what a layer is.
    """

    d_in: int
    d_out: int
    kind: str = "linear"
    experts: int = 0
    active: int = field(default=1, compare=False)

    def __str__(self) -> str:
        many = f" {self.experts} experts of" if self.experts else ""
        return f"{self.kind}{many} {self.d_in} -> {self.d_out}"

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes that A and B have before their own: ``(E,)`` or none."""
        return (self.experts,) if self.experts else ()

    def sides(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B of a pair."""
        return (*self.lead, rank, self.d_in), (*self.lead, self.d_out, rank)

    def parameters(self, rank: int) -> int:
        """How many values a pair has: r (d_in + d_out) for each expert."""
        return max(self.experts, 1) * rank * (self.d_in + self.d_out)

    @classmethod
    def told(cls, info: LayerInfo) -> LayerShape:
        """The shape of a layer that a backend told of."""
        return cls(info.d_in, info.d_out, info.kind, info.experts, info.active)

    @classmethod
    def of(cls, path: str, sizes: Sizes) -> LayerShape:
        """Sizes as users give them.

        Raises:
            TargetError: they have another form; the layer is named.
        """
        if isinstance(sizes, LayerShape):
            return sizes
        try:
            d_in, d_out, *rest = sizes
            if int(d_in) >= 0 and int(d_out) >= 0 and rest in ([], ["linear"], ["embedding"]):
                return cls(int(d_in), int(d_out), *rest)
        except (TypeError, ValueError):
            pass
        raise TargetError(
            f"layer {path!r}: sizes are (d_in, d_out) or (d_in, d_out, 'embedding'), got {sizes!r}"
        )


Sizes = Union[LayerShape, Sequence[Any]]
"""A layer's sizes as users give them: ``(d_in, d_out)`` or ``(d_in, d_out, "embedding")``."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A configuration, the adapted layers, and the low-rank pairs of every feature.

    Attributes:
        config: the configuration.
        layers: the adapted layers by path, in the model's order.
        tensors: ``<path>.A.<group>.<feature>`` ``[r, d_in]`` and ``<path>.B.<group>.<feature>`` ``[d_out, r]``, with
            an axis of experts in front if the layer has one.
        heads: parameters of the base that were trained with the features, by their names in the model.
        base: what the adapter was trained on, if that is known.

    Raises:
        AdapterError: a missing or unexpected tensor, or one of the wrong shape or dtype; the error names it.
    """

    config: FlixConfig
    layers: Mapping[str, LayerShape]
    tensors: Mapping[str, NDArray[Any]] = field(repr=False)
    heads: Mapping[str, Head] = field(default_factory=dict, repr=False)
    base: Base | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        # A dtype's name is worked out anew at every asking, which shows with many tensors.
        names = {dtype: str(dtype) for dtype in {t.dtype for t in self.tensors.values()}}
        dtypes = {name: names[tensor.dtype] for name, tensor in self.tensors.items()}
        check_tensors(self.config, self.layers, shapes, dtypes, "the adapter")

    @classmethod
    def partial(
        cls,
        config: FlixConfig,
        layers: Mapping[str, LayerShape],
        tensors: Mapping[str, NDArray[Any]],
        heads: Mapping[str, Head] | None = None,
        base: Base | None = None,
    ) -> Adapter:
        """An adapter whose tensors are not checked again, or belong to only some of the features."""
        adapter = object.__new__(cls)
        vars(adapter).update(
            config=config, layers=layers, tensors=tensors, heads=heads or {}, base=base
        )
        return adapter

    def pair(self, layer: str, feature: Feature) -> tuple[NDArray[Any], NDArray[Any]]:
        """A_f and B_f of a feature in a layer, see :data:`Pair`; empty if its rank is 0.

        Raises:
            AdapterError: the layer is not adapted.
            FeatureError: no such feature.
        """
        feature = self.config.registry.features[self.config.registry.id(*feature)]
        if layer not in self.layers:
            raise AdapterError(
                f"layer {layer!r} is not adapted{near(layer, self.layers)}; adapted layers: "
                f"{listed(self.layers)}"
            )
        shape = self.layers[layer]
        if self.config.rank(layer, feature) == 0:
            a, b = shape.sides(0)
            return np.zeros(a, np.float32), np.zeros(b, np.float32)
        return (
            self.tensors[tensor_name(layer, "A", feature)],
            self.tensors[tensor_name(layer, "B", feature)],
        )

    def renamed(self, rename: Rename) -> Adapter:
        """The same adapter with other layer paths; heads follow their modules' paths.

        Args:
            rename: a mapping (paths that it does not name stay) or a callable, from this adapter's paths to the new
                ones.

        Raises:
            AdapterError: two layers or heads get the same name, a mapping names an unknown layer, or a callable
                returns something that is not a string.
        """
        if rename is None:
            return self
        renamer = _renamer(rename, {**self.layers, **{_module(name): None for name in self.heads}})
        layers: dict[str, LayerShape] = {}
        tensors: dict[str, NDArray[Any]] = {}
        for old, shape in self.layers.items():
            new = renamer(old)
            if not isinstance(new, str) or not new:
                raise AdapterError(f"rename must give a layer path, got {new!r} for {old!r}")
            if new in layers:
                raise AdapterError(f"rename gives the path {new!r} to two layers, {old!r} is one")
            layers[new] = shape
            for feature in self.config.registry.features:
                if self.config.rank(old, feature) == 0:
                    continue
                for part in "AB":
                    tensors[tensor_name(new, part, feature)] = self.tensors[
                        tensor_name(old, part, feature)
                    ]
        heads = {}
        for name, head in self.heads.items():
            path, _, own = name.rpartition(".")
            new = f"{renamer(path)}.{own}" if path else name
            if new in heads:
                raise AdapterError(f"rename gives the name {new!r} to two heads, {name!r} is one")
            heads[new] = head
        config = _with_ranks_of(self.config, self.layers, layers)
        return Adapter(config, layers, tensors, heads, self.base)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _renamer(rename: Rename, layers: Mapping[str, Any]) -> Callable[[str], str]:
    if callable(rename):
        return rename
    if not isinstance(rename, Mapping):
        raise AdapterError(f"rename must be a mapping of layer paths or a callable, got {rename!r}")
    table: Mapping[str, str] = rename
    for old in table:
        if old not in layers:
            raise AdapterError(
                f"rename names the layer {old!r}, which is not adapted{near(old, layers)}; "
                f"adapted layers: {listed(layers)}"
            )
    return lambda path: table.get(path, path)


def _with_ranks_of(
    config: FlixConfig, old: Mapping[str, LayerShape], new: Mapping[str, LayerShape]
) -> FlixConfig:
    """The configuration for renamed layers: patterns may not match the new paths, so they are spelled out."""
    said: dict[str, Any] = {}
    if config.rank_pattern:
        said["rank_pattern"] = _spelled(config, old, new, config.rank)
    if config.alpha_pattern:
        said["alpha_pattern"] = _spelled(config, old, new, config.layer_alpha)
    return replace(config, **said) if said else config


def _spelled(
    config: FlixConfig,
    old: Mapping[str, LayerShape],
    new: Mapping[str, LayerShape],
    number: Callable[[str, Feature], float | None],
) -> dict[str, Any]:
    groups: dict[tuple[tuple[Feature, float], ...], list[str]] = {}
    for before, path in zip(old, new, strict=True):
        numbers = ((f, number(before, f)) for f in config.registry.live)
        groups.setdefault(tuple((f, n) for f, n in numbers if n is not None), []).append(path)
    return {exactly(paths): nested(dict(numbers)) for numbers, paths in groups.items()}


def tensor_name(layer: str, part: str, feature: Feature) -> str:
    """The name of a tensor in the file; ``part`` is ``"A"`` or ``"B"``."""
    return f"{layer}.{part}.{feature[0]}.{feature[1]}"


def expected_tensors(
    config: FlixConfig, layers: Mapping[str, LayerShape]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that an adapter of these layers has."""
    ends = [f".{group}.{name}" for group, name in config.registry.features]
    for path, shape in layers.items():
        a, b = f"{path}.A", f"{path}.B"
        for i, rank in config.updates(path):
            a_shape, b_shape = shape.sides(rank)
            yield a + ends[i], a_shape
            yield b + ends[i], b_shape


def checked_pairs(
    config: FlixConfig,
    layers: Mapping[str, LayerShape],
    pairs: Mapping[str, Mapping[Feature, Pair]],
) -> list[tuple[str, NDArray[Any]]]:
    """Pairs by layer and feature as an adapter's tensors, with their names.

    Raises:
        AdapterError: a pair is missing, or has another shape; it is named.
    """
    found: list[tuple[str, NDArray[Any]]] = []
    features = config.registry.features
    ends = [f".{group}.{name}" for group, name in features]
    for path, shape in layers.items():
        layer, a_name, b_name = pairs[path], f"{path}.A", f"{path}.B"
        for i, rank in config.updates(path):
            feature, end = features[i], ends[i]
            if feature not in layer:
                raise AdapterError(f"layer {path!r} has no pair of {written(feature)}")
            a, b = layer[feature]
            if (a.shape, b.shape) != shape.sides(rank):
                wanted = [list(side) for side in shape.sides(rank)]
                raise AdapterError(
                    f"layer {path!r}: the pair of {written(feature)} must have the shapes "
                    f"{wanted[0]} and {wanted[1]}, got {list(a.shape)} and {list(b.shape)}"
                )
            found += ((a_name + end, a), (b_name + end, b))
    return found


def check_tensors(
    config: FlixConfig,
    layers: Mapping[str, LayerShape],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    where: str,
) -> None:
    """Refuse tensors that are not those of an adapter of these layers.

    Args:
        config: the configuration.
        layers: the adapted layers by path.
        shapes: of the tensors, by name.
        dtypes: their names: ``"float32"``, or as safetensors has them, ``"F32"``.
        where: what holds the tensors, for messages.

    Raises:
        AdapterError: a missing or unexpected tensor, or one of the wrong shape or dtype; the error names it.
    """
    # One by one: a file may describe far more tensors than it holds.
    count = 0
    for name, shape in expected_tensors(config, layers):
        if shapes.get(name) != shape or dtypes[name] not in _ALLOWED:
            raise _unlike(name, shape, shapes, dtypes, where)
        count += 1
        if count > len(shapes):
            break
    if count == len(shapes):
        return
    if count < len(shapes):
        expected = dict(expected_tensors(config, layers))
        surplus = [name for name in shapes if name not in expected]
        raise AdapterError(f"{where} has tensors that do not belong to it: {listed(surplus, 5)}")
    raise AdapterError(f"{where}: two layers or features give a tensor the same name; rename one")


def _unlike(
    name: str,
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    where: str,
) -> AdapterError:
    if name not in shapes:
        return AdapterError(f"{where} lacks the tensor {name!r}{near(name, shapes, limit=1)}")
    if shapes[name] != shape:
        return AdapterError(
            f"{where}: tensor {name!r} must have the shape {list(shape)}, got {list(shapes[name])}"
        )
    return AdapterError(
        f"{where}: tensor {name!r} must be float16, float32 or float64, got {dtypes[name]}"
    )
