"""Saving and loading adapters (docs/specification.md §4.2): one file for every backend."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flix.backends.torch.heads import put_heads, read_heads, remove_heads, save_heads
from flix.backends.torch.model import (
    adapt_paths,
    flix_layers,
    layer_shapes,
    require_adapted,
)
from flix.core.adapter.adapter import Adapter, LayerShape, Rename, tensor_name
from flix.core.adapter.compatibility import check_fits, check_same
from flix.core.adapter.files import load_adapter, save_adapter
from flix.core.adapter.sharing import select_features
from flix.core.files import Path_
from flix.core.garbage import uncollected

Model = TypeVar("Model", bound=nn.Module)


@uncollected
def to_adapter(model: nn.Module) -> Adapter:
    """The model's features as a numpy :class:`flix.Adapter`; values are copied.

    Raises:
        TargetError: the model is not adapted.
    """
    return _adapter_of(model, "to_adapter", copy=True)


def _adapter_of(model: nn.Module, what: str, copy: bool) -> Adapter:
    config = require_adapted(model, what)
    layers, tensors = {}, {}
    for path, layer in flix_layers(model):
        layers[path] = LayerShape(d_in=layer.d_in, d_out=layer.d_out, kind=layer.flix_kind)
        for feature, a, b in layer.pairs():
            for part, parameter in (("A", a), ("B", b)):
                tensors[tensor_name(path, part, feature)] = _whole(parameter, copy)
    return Adapter(config, layers, tensors)


def _whole(parameter: Tensor, copy: bool) -> NDArray[Any]:
    """A parameter's values on the host, gathered if it is sharded; halves as float32."""
    value = parameter.detach()
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    found: NDArray[Any] = value.cpu().numpy()
    return found.copy() if copy else found


@uncollected
def save(model: nn.Module, directory: Path_, features: Any = None) -> None:
    """Write the model's adapter as a folder (the base is not written).

    Parameters of the base that were unfrozen, such as a classifier head, go beside it as ``trained.safetensors``.

    Args:
        model: an adapted model.
        directory: the folder.
        features: ``[(group, name), ...]`` or ``{group: name or names}``: these alone, and what they imply, without
            heads; default: all. ``load_features`` takes them into another model.

    Raises:
        FeatureError: an unknown feature.
        TargetError: the model is not adapted.
        AdapterError: the path is a file.
    """
    adapter = _adapter_of(model, "save", copy=False)
    if features is not None:
        save_adapter(select_features(adapter, features), directory)
        remove_heads(directory)
        return
    save_adapter(adapter, directory)
    save_heads(model, directory)


@uncollected
def load(model: Model, directory: Path_, rename: Rename = None, *, strategy: str = "auto") -> Model:
    """Load an adapter into a model, in place.

    A plain model is adapted with the file's configuration; an adapted one must have the same layers, features and
    ranks, and gets the file's values. Heads that were trained with the adapter (``trained.safetensors``) get their
    values, too, and require gradients, as they did.

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
    adapter = load_adapter(directory, rename)
    check_fits(adapter, layer_shapes(model))  # what it says of layers comes before what heads say
    heads = read_heads(model, directory, rename)
    load_into(model, adapter, strategy=strategy)
    put_heads(model, heads)
    return model


def load_into(model: Model, adapter: Adapter, *, strategy: str = "auto") -> Model:
    """Put a numpy adapter into a model; otherwise as :func:`load`."""
    check_fits(adapter, layer_shapes(model))
    present = dict(flix_layers(model))
    if not present:
        # Exactly the adapter's layers, whatever its patterns would match in this model.
        adapt_paths(model, adapter.config, list(adapter.layers), strategy, adapter)
        return model
    layouts = {path: layer.flix_layout for path, layer in present.items()}
    check_same(adapter, require_adapted(model, "load"), layouts)
    with torch.no_grad():
        for path, layer in present.items():
            for feature, a, b in layer.pairs():
                for part, parameter in (("A", a), ("B", b)):
                    value = adapter.tensors[tensor_name(path, part, feature)]
                    parameter.copy_(torch.from_numpy(value.copy()))
    return model
