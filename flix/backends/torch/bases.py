"""The base that a model's adapter is trained on, as files know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flix.backends.torch.attention import attention_of
from flix.backends.torch.experts import experts_of, site
from flix.backends.torch.layer import KERNELS, FlixLayer
from flix.backends.torch.targets import adaptable
from flix.core.adapter.base import Places

_READABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def base_name(model: nn.Module) -> tuple[str | None, str | None]:
    """What transformers' configuration says: the name or folder, and the commit on the hub."""
    settings = getattr(model, "config", None)
    said = (getattr(settings, "name_or_path", None), getattr(settings, "_commit_hash", None))
    name, revision = (value if isinstance(value, str) and value else None for value in said)
    return name, revision


def kernel_samples(
    model: nn.Module, places: Mapping[str, Places]
) -> dict[str, NDArray[Any]] | None:
    """Values of kernels; None where one is quantised, sharded, or not there (meta, offloaded)."""
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for path, where in places.items():
            module, name = site(model, path)
            layer: Any = vars(module).get(KERNELS, {}).get(name, module)
            kernel = vars(layer).get("flix_kernel", module._parameters.get(name))
            readable = type(kernel) is nn.Parameter and kernel.dtype in _READABLE
            straight = _straight(module)
            if straight is None or not readable or kernel.is_meta:
                return None
            sides = (where.columns, where.rows) if straight else (where.rows, where.columns)
            if isinstance(module, nn.modules.conv._ConvNd):
                kernel = kernel.flatten(1)
            lead = () if where.experts is None else (where.experts,)
            at = tuple(torch.from_numpy(i).to(kernel.device) for i in (*lead, *sides))
            found[path] = kernel[at].double()
        # One copy a device instead of one a kernel.
        devices = {value.device for value in found.values()}
        moved: dict[str, NDArray[Any]] = {}
        for device in devices:
            held = {path: v for path, v in found.items() if v.device == device}
            flat = torch.cat(list(held.values())).cpu().numpy()
            ends = np.cumsum([len(v) for v in held.values()])[:-1]
            moved.update(zip(held, np.split(flat, ends), strict=True))
    return moved


def _straight(module: nn.Module) -> bool | None:
    """Whether a layer, adapted or not, keeps its kernel ``[d_in, d_out]``; None where it cannot be adapted."""
    if experts_of(module)[0]:
        return bool(module.is_transposed)
    if attention_of(module)[0]:
        return False
    kind = type(module) if isinstance(module, FlixLayer) else adaptable(module)[0]
    return None if kind is None else kind.flix_transposed
