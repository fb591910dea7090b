"""What the verbs share: checks, and a model's features as an adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.backends import messages
from flix.backends.protocol import (
    Backend,
    Pairs,
    SupportsBase,
    SupportsDropout,
    SupportsProcesses,
    lacking,
)
from flix.core.adapter.adapter import Adapter, LayerShape, Pair, tensor_name
from flix.core.adapter.base import fingerprint, places
from flix.core.adapter.compatibility import check_fits
from flix.core.adapter.composition import Composition, composition
from flix.core.adapter.described import Base
from flix.core.config.config import FlixConfig
from flix.core.errors import ConfigError, TargetError
from flix.core.features.encoding import Row
from flix.core.features.names import Feature


class Shared:
    """Verbs stand on one backend's primitives.

    Attributes:
        primitives: the backend's.
    """

    def __init__(self, primitives: Backend) -> None:
        self.primitives = primitives

    def config_of(self, verb: str, model: Any) -> FlixConfig:
        config = self.primitives.adapted(model)
        if config is None:
            raise messages.not_adapted(verb, model)
        return config

    def check_plain(self, model: Any) -> None:
        if self.primitives.adapted(model) is not None:
            raise messages.adapted_already()
        self.primitives.check_plain(model)

    def check_fits(self, adapter: Adapter, model: Any) -> None:
        """Refuse an adapter whose layers are not among those that the model has, adapted or not."""
        infos = self.primitives.layers(model)
        if infos is None:  # any layer may join
            stacked = [path for path, shape in adapter.layers.items() if shape.experts]
            if stacked:
                raise messages.no_experts(stacked)
            layers = {**adapter.layers, **self.primitives.shapes(model)}
        else:
            layers = {i.path: LayerShape.told(i) for i in infos if i.kind}
        check_fits(adapter, layers)

    def undropped(self, config: FlixConfig, layers: Mapping[str, LayerShape]) -> ConfigError | None:
        """The error that ``lora_dropout`` cannot act in all of these layers; None where it can, or is 0."""
        rate = config.lora_dropout
        if not rate:
            return None
        if not self.offers(SupportsDropout):
            return messages.undropped(rate, None)
        found = self.primitives.undropped(layers)  # type: ignore[attr-defined]
        return messages.undropped(rate, found) if found else None

    def adapter_of(
        self, model: Any, features: Collection[Feature] | None = None, copy: bool = False
    ) -> Adapter:
        """The model's features as an adapter; of some of them, an adapter that lacks the others' tensors."""
        config = self.primitives.adapted(model)
        assert config is not None
        tensors = named(self.primitives.read(model, features))
        if copy:
            tensors = {name: np.array(value) for name, value in tensors.items()}
        layers = dict(self.primitives.shapes(model))
        return (Adapter if features is None else Adapter.partial)(config, layers, tensors)

    def composed(self, verb: str, model: Any, row: Row) -> tuple[Composition, Adapter]:
        """A row's composition, and an adapter of its features alone."""
        active = composition(self.config_of(verb, model), row)
        return active, self.adapter_of(model, [feature for feature, _ in active])

    def offers(self, protocol: type) -> bool:
        """Whether the backend gives what is optional."""
        return not lacking(self.primitives, protocol)

    def base_of(self, model: Any, layers: Mapping[str, LayerShape]) -> Base | None:
        """What is known of the base of a plain or adapted model, its fingerprint by these layers."""
        if not self.offers(SupportsBase):
            return None
        name, revision = self.primitives.base_name(model)  # type: ignore[attr-defined]
        looked_at = {path: places(shape) for path, shape in layers.items()}
        samples = self.primitives.kernel_samples(model, looked_at)  # type: ignore[attr-defined]
        base = Base(name, revision, fingerprint(layers, samples))
        return None if base == Base() else base

    def writing(self, model: Any) -> AbstractContextManager[bool]:
        """Around the writing of a model's files: whether this process writes them."""
        if not self.offers(SupportsProcesses):
            return nullcontext(True)
        return self.primitives.writing(model)  # type: ignore[attr-defined, no-any-return]

    def supporting(self, protocol: type, verb: str) -> Any:
        if missing := lacking(self.primitives, protocol):
            raise TargetError(
                f"this backend does not offer {verb}: its primitives lack {', '.join(missing)}"
            )
        return self.primitives


def named(pairs: Pairs) -> dict[str, NDArray[Any]]:
    """Values under the names of adapter files."""
    return {
        tensor_name(path, part, feature): value
        for path, layer in pairs.items()
        for feature, pair in layer.items()
        for part, value in zip("AB", pair, strict=True)
    }


def by_layer(adapter: Adapter) -> dict[str, dict[Feature, Pair]]:
    """An adapter's pairs by layer and feature; without those of rank 0."""
    return {path: layer_pairs(adapter, path) for path in adapter.layers}


def layer_pairs(adapter: Adapter, path: str) -> dict[Feature, Pair]:
    """An adapter's pairs in a layer; without those of rank 0."""
    config, tensors = adapter.config, adapter.tensors
    return {
        feature: (
            tensors[tensor_name(path, "A", feature)],
            tensors[tensor_name(path, "B", feature)],
        )
        for feature, rank in zip(config.registry.features, config.layer_ranks(path), strict=True)
        if rank
    }
