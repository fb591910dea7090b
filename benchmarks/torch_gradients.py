"""The pairs of features in torch and their gradients, however parameters hold them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from flix.backends.torch.layer import FlixLayer


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every adapted layer."""
    for path, module in model.named_modules():
        if isinstance(module, FlixLayer):
            yield path, module


def model_pairs(
    model: nn.Module, features: Collection[tuple[str, str]] | None = None
) -> dict[str, Tensor]:
    """The pairs as ``<path>.A.<group>.<feature>``: parameters, or views of parameters.

    Args:
        model: an adapted model.
        features: which; default: all.
    """
    if features is None:
        features = model.flix_config.registry.features  # type: ignore[union-attr]
    return {
        f"{path}.{part}.{feature[0]}.{feature[1]}": side[feature]
        for path, layer in adapted_layers(model)
        for part, side in (("A", layer.flix_A), ("B", layer.flix_B))
        for feature in features
        if feature in side
    }


def pair_gradients(
    pairs: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]
) -> dict[str, Any]:
    """:func:`gradients_of`, as arrays."""
    found = gradients_of(pairs, parameters)
    return {name: None if v is None else v.cpu().numpy() for name, v in found.items()}


def gradients_of(
    pairs: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]
) -> dict[str, Tensor | None]:
    """The gradient of each tensor; None where none was computed.

    Args:
        pairs: tensors by name: parameters themselves, or views of parameters that hold more than one pair.
        parameters: the model's.

    Raises:
        LookupError: a tensor lies in none of the parameters.
    """
    found: dict[str, Tensor | None] = {}
    for name, pair, parameter in _held(pairs, parameters):
        if (gradient := parameter.grad) is None:
            found[name] = None
            continue
        if (pair.shape, pair.stride()) != (parameter.shape, parameter.stride()):
            gradient = gradient.contiguous()  # it may be a view, too
            offset = pair.storage_offset() - parameter.storage_offset() + gradient.storage_offset()
            gradient = gradient.as_strided(pair.shape, pair.stride(), offset)
        found[name] = gradient.detach()
    return found


def other_gradients(pairs: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> int:
    """How many parameters have a gradient though they hold none of the pairs."""
    parameters = list(parameters)
    holding = {id(parameter) for _, _, parameter in _held(pairs, parameters)}
    return sum(p.grad is not None and id(p) not in holding for p in parameters)


def _held(
    pairs: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]
) -> Iterator[tuple[str, Tensor, nn.Parameter]]:
    """(name, pair, the parameter that holds it) of every pair."""
    by_storage: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        if (
            type(parameter.data) is not Tensor
        ):  # torchao's kernels, which have no storage of their own
            continue
        by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
    for name, pair in pairs.items():
        for parameter in by_storage.get(pair.untyped_storage().data_ptr(), ()):
            offset = pair.storage_offset() - parameter.storage_offset()
            if offset >= 0 and offset + pair.numel() <= parameter.numel():
                yield name, pair, parameter
                break
        else:
            raise LookupError(f"{name} lies in no parameter of the model")
