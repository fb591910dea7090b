"""The gradients of features' pairs in torch, however their parameters hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def pair_gradients(
    pairs: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]
) -> dict[str, Any]:
    """The gradient of each tensor, as an array; None where none was computed.

    Args:
        pairs: tensors by name: parameters themselves, or views of parameters that hold more than one pair.
        parameters: the model's.

    Raises:
        LookupError: a tensor lies in none of the parameters.
    """
    held: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        held.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
    found: dict[str, Any] = {}
    for name, pair in pairs.items():
        start = pair.storage_offset()
        for parameter in held.get(pair.untyped_storage().data_ptr(), ()):
            offset = start - parameter.storage_offset()
            if offset >= 0 and offset + pair.numel() <= parameter.numel():
                break
        else:
            raise LookupError(f"{name} lies in no parameter of the model")
        if (gradient := parameter.grad) is None:
            found[name] = None
            continue
        if (pair.shape, pair.stride()) != (parameter.shape, parameter.stride()):
            gradient = gradient.contiguous().as_strided(pair.shape, pair.stride(), offset)
        found[name] = gradient.detach().cpu().numpy()
    return found
