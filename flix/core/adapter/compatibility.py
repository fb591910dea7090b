"""Whether an adapter and a model fit each other; the first thing that does not is named."""

from __future__ import annotations

from collections.abc import Mapping

from flix.core.adapter.adapter import Adapter, LayerShape
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.errors import AdapterError, near
from flix.core.features.names import written


def check_fits(adapter: Adapter, layers: Mapping[str, LayerShape], what: str = "the model") -> None:
    """Refuse an adapter whose layers are not the model's.

    Args:
        adapter: the adapter, after renaming.
        layers: every layer of the model that can be adapted, by path.
        what: the model, in words.

    Raises:
        AdapterError: the first layer that is missing or has other sizes.
    """
    for path, shape in adapter.layers.items():
        if path not in layers:
            raise AdapterError(
                f"the adapter was made for another architecture: {what} has no layer {path!r}"
                f"{near(path, layers)} that can be adapted; rename= translates layer paths"
            )
        found = layers[path]
        if found != shape:
            raise AdapterError(
                f"the adapter was made for another architecture: layer {path!r} is {shape} in the adapter and "
                f"{found} in {what}"
            )


def check_same(adapter: Adapter, config: FlixConfig, layouts: Mapping[str, LayerLayout]) -> None:
    """Refuse an adapter whose values have no place in an adapted model: other layers, features, ranks or scales.

    Args:
        adapter: the adapter.
        config: the model's configuration.
        layouts: ranks and scales of the model's adapted layers, by path.

    Raises:
        AdapterError: the first difference.
    """
    for path in layouts:
        if path not in adapter.layers:
            raise AdapterError(f"layer {path!r} of the model is adapted, but not in the adapter")
    for path in adapter.layers:
        if path not in layouts:
            raise AdapterError(f"layer {path!r} of the adapter is not adapted in the model")
    features = config.registry.features
    other = adapter.config.registry
    if (features, config.registry.removed) != (other.features, other.removed):
        raise AdapterError(
            "the adapter has other features than the model: "
            f"{adapter.config.registry} and {config.registry}; load_features takes over some features"
        )
    for path, layout in layouts.items():
        theirs = adapter.config.layout(path)
        if layout == theirs:
            continue
        for i, feature in enumerate(features):
            if layout.ranks[i] != theirs.ranks[i]:
                raise AdapterError(
                    f"layer {path!r}: {written(feature)} has rank {layout.ranks[i]} in the model and "
                    f"{theirs.ranks[i]} in the adapter"
                )
            if layout.scales[i] != theirs.scales[i]:
                raise AdapterError(
                    f"layer {path!r}: {written(feature)} has another scale in the model than in the "
                    "adapter (alpha or scaling differ)"
                )
