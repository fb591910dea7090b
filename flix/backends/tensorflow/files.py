"""Saving and loading adapters (docs/specification.md §4.2): one file for every backend."""

from __future__ import annotations

from typing import Any

from flix.backends.tensorflow._base import flix_layers, layer_shapes
from flix.backends.tensorflow.model import (
    FlixModel,
    adapt_layers,
    require_adapted,
    require_plain,
)
from flix.core.adapter.adapter import Adapter, LayerShape, Rename, tensor_name
from flix.core.adapter.compatibility import check_fits, check_same
from flix.core.adapter.files import load_adapter, save_adapter
from flix.core.adapter.sharing import select_features
from flix.core.files import Path_


def to_adapter(model: FlixModel) -> Adapter:
    """The model's features as a numpy :class:`flix.Adapter`; values are copied.

    Raises:
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "to_adapter")
    layers, tensors = {}, {}
    for path, layer in flix_layers(model.base):
        layers[path] = LayerShape(d_in=layer.d_in, d_out=layer.d_out, kind=layer.flix_kind)
        for feature, a, b in layer.pairs():
            tensors[tensor_name(path, "A", feature)] = a
            tensors[tensor_name(path, "B", feature)] = b
    return Adapter(config, layers, tensors)


def save(model: FlixModel, directory: Path_, features: Any = None) -> None:
    """Write the model's adapter as a folder (the base is not written).

    Args:
        model: an adapted model.
        directory: the folder.
        features: ``[(group, name), ...]`` or ``{group: name or names}``: these alone, and what they imply; default:
            all. ``load_features`` takes them into another model.

    Raises:
        FeatureError: an unknown feature.
        TargetError: the model is not adapted.
        AdapterError: the path is a file.
    """
    adapter = to_adapter(model)
    save_adapter(adapter if features is None else select_features(adapter, features), directory)


def load(
    model: Any, directory: Path_, rename: Rename = None, *, strategy: str = "auto"
) -> FlixModel:
    """Load an adapter into a model.

    A plain model is adapted with the file's configuration, in place, and comes back as :class:`FlixModel`; an
    adapted one must have the same layers, features and ranks, and gets the file's values.

    Args:
        model: a plain or adapted model.
        directory: the adapter's folder.
        rename: translates the file's layer paths to the model's.
        strategy: as for ``adapt``, for a plain model.

    Raises:
        AdapterError: a damaged file, or one for another architecture (the first mismatching layer is named).
    """
    return load_into(model, load_adapter(directory, rename), strategy=strategy)


def load_into(model: Any, adapter: Adapter, *, strategy: str = "auto") -> FlixModel:
    """Put a numpy adapter into a model; otherwise as :func:`load`."""
    adapted = model if isinstance(model, FlixModel) else None
    if adapted is None:
        require_plain(model)
    check_fits(adapter, layer_shapes(model.base if adapted is not None else model))
    if adapted is None:
        adapted = adapt_layers(model, adapter.config, list(adapter.layers), strategy)
    present = dict(flix_layers(adapted.base))
    layouts = {path: layer.flix_layout for path, layer in present.items()}
    check_same(adapter, require_adapted(adapted, "load"), layouts)
    features = adapter.config.registry.live
    for path, layer in present.items():
        pairs = {feature: adapter.pair(path, feature) for feature in features}
        layer.set_pairs(
            {feature: a for feature, (a, _) in pairs.items()},
            {feature: b for feature, (_, b) in pairs.items()},
        )
    return adapted
