"""Which modules of a model can be adapted, and what they become (docs/specification.md §4.6, §5.2)."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from flix.backends.torch.around import around, encloses, readable
from flix.backends.torch.convolutions import convolution
from flix.backends.torch.layer import FlixLayer
from flix.backends.torch.layers import FlixConv1D, FlixEmbedding, FlixLinear, carry
from flix.backends.torch.patches.hooked import rebind, runs_own
from flix.backends.torch.scaled import is_scaled_embedding
from flix.backends.torch.sharded import FORWARD, FlixSharded, sharded
from flix.backends.torch.state import FlixState
from flix.core.errors import TargetError

# What nn.MultiheadAttention has for its out_proj: nn.Linear, under a name by which quantisation passes it over.
_OUT_PROJ = nn.modules.linear.NonDynamicallyQuantizableLinear


def _conv1d_class() -> type[nn.Module] | None:
    """transformers' Conv1D, if transformers is loaded (a model that has one has loaded it)."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def adaptable(module: nn.Module) -> tuple[type[FlixLayer] | None, str]:
    """The class that an unadapted module becomes, or None with the reason (empty for other kinds of modules)."""
    if isinstance(module, FlixLayer):
        return None, "it is adapted already"
    found, reason = sharded(module)
    if found is not None or reason:
        return found, reason
    conv1d = _conv1d_class()
    for base, target in (
        (nn.Linear, FlixLinear),
        (nn.Embedding, FlixEmbedding),
        (conv1d, FlixConv1D),
    ):
        if base is None or not isinstance(module, base):
            continue
        if not runs_own(module):
            return None, "its forward is patched on the instance"
        plain = type(module) in (base, _OUT_PROJ) or is_scaled_embedding(module)
        if encloses(module) and not (plain and readable(module.weight)):  # type: ignore[arg-type]
            return around(type(module)), ""
        if not plain:
            what = (
                "does not give vectors of its size"
                if base is nn.Linear
                else "is not one that flix knows"
            )
            return None, f"its class {type(module).__name__} has a forward of its own, which {what}"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return None, "an embedding with max_norm rewrites its kernel"
        if not readable(module.weight):  # type: ignore[arg-type]
            return None, "its kernel is quantised"
        return target, ""
    if encloses(module):
        return around(type(module)), ""
    if isinstance(module, nn.modules.conv._ConvNd):
        kind, reason = convolution(module)
        if kind is not None and not runs_own(module):
            return None, "its forward is patched on the instance"
        if kind is not None and not readable(module.weight):
            return None, "its kernel is quantised"
        return kind, reason
    if isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features"):
        own = type(module).__name__
        return None, f"its class {own} is not an nn.Linear, nor a quantised layer that flix knows"
    # DBRX keeps experts one below the other, in a matrix that only the name tells.
    axes = 2 if "expert" in type(module).__name__.lower() else 3
    if not isinstance(module, ParametrizationList) and any(
        p is not None and p.dim() in (axes, 3) and min(p.shape) > 1
        for p in module._parameters.values()
    ):
        return None, f"{type(module).__name__} stacks its kernels in one tensor, as experts do"
    return None, ""


def target_of(module: nn.Module, name: str) -> type[FlixLayer]:
    """The class that a plain layer becomes.

    Raises:
        TargetError: it cannot be adapted.
    """
    target, reason = adaptable(module)
    if target is None:
        raise TargetError(f"layer {name!r} cannot be adapted: {reason or type(module).__name__}")
    return target


def become(module: nn.Module, name: str, place: int, state: FlixState) -> FlixLayer:
    """Turn a plain layer into its adapted class, in place: references, hooks and sharing stay as they are.

    Raises:
        TargetError: it cannot be adapted.
    """
    base, module.__class__ = type(module), target_of(module, name)  # type: ignore[assignment]
    assert isinstance(module, FlixLayer)
    rebind(module, base)
    carry(module, name, place, state, base)
    if isinstance(module, FlixSharded):
        vars(module)[FORWARD] = vars(module).pop("forward")
    return module


def revert(module: FlixLayer) -> None:
    """Turn an adapted layer back into the plain layer it was, in place."""
    adapted, base = type(module), module.flix_base
    if "flix_kernel" in vars(module):  # merged in place: the base's own kernel comes back
        module.weight = vars(module)["flix_kernel"]
    own = vars(module).get(FORWARD)
    for name in [key for key in vars(module) if key.startswith("flix_")]:
        delattr(module, name)
    module.__class__ = base  # type: ignore[assignment]
    rebind(module, adapted)
    if own is not None:
        vars(module)["forward"] = own
