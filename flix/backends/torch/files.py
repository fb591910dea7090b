"""Saving and loading adapters (SPEC §4): one file for every backend."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from flix.backends.torch.model import (
    adapt_paths,
    flix_layers,
    layer_shapes,
    require_adapted,
)
from flix.core.adapter import (
    Adapter,
    LayerShape,
    Path_,
    Rename,
    load_adapter,
    save_adapter,
    tensor_name,
)
from flix.core.fitting import check_fits, check_same

Model = TypeVar("Model", bound=nn.Module)


def to_adapter(model: nn.Module) -> Adapter:
    """The model's features as a numpy :class:`flix.Adapter`; values are copied.

    Raises:
        TargetError: the model is not adapted.
    """
    config = require_adapted(model, "to_adapter")
    layers, tensors = {}, {}
    for path, layer in flix_layers(model):
        layers[path] = LayerShape(d_in=layer.d_in, d_out=layer.d_out, kind=layer.flix_kind)
        for feature, a, b in layer.pairs():
            for part, parameter in (("A", a), ("B", b)):
                tensors[tensor_name(path, part, feature)] = _whole(parameter)
    return Adapter(config, layers, {name: t.numpy() for name, t in tensors.items()})


def _whole(parameter: Tensor) -> Tensor:
    """A parameter's values on the host, gathered if it is sharded; halves as float32."""
    value = parameter.detach()
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    if value.dtype == torch.bfloat16 or value.dtype == torch.float16:
        value = value.float()
    return value.cpu().clone().contiguous()


def save(model: nn.Module, directory: Path_) -> None:
    """Write the model's adapter as a folder (the base is not written).

    Raises:
        TargetError: the model is not adapted.
        AdapterError: the path is a file.
    """
    save_adapter(to_adapter(model), directory)


def load(model: Model, directory: Path_, rename: Rename = None, *, strategy: str = "auto") -> Model:
    """Load an adapter into a model, in place.

    A plain model is adapted with the file's configuration; an adapted one must have the same layers, features and
    ranks, and gets the file's values.

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
    return load_into(model, adapter, strategy=strategy)


def load_into(model: Model, adapter: Adapter, *, strategy: str = "auto") -> Model:
    """Put a numpy adapter into a model; otherwise as :func:`load`."""
    check_fits(adapter, layer_shapes(model))
    present = dict(flix_layers(model))
    if not present:
        # Exactly the adapter's layers, whatever its patterns would match in this model.
        adapt_paths(model, adapter.config, list(adapter.layers), strategy)
        present = dict(flix_layers(model))
    layouts = {path: layer.flix_layout for path, layer in present.items()}
    check_same(adapter, require_adapted(model, "load"), layouts)
    with torch.no_grad():
        for path, layer in present.items():
            for feature, a, b in layer.pairs():
                for part, parameter in (("A", a), ("B", b)):
                    value = adapter.tensors[tensor_name(path, part, feature)]
                    parameter.copy_(torch.from_numpy(value.copy()))
    return model
