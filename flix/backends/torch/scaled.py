"""Embeddings that multiply what they look up: Gemma's, BART's, M2M100's and their kin in transformers.

They are subclasses of ``nn.Embedding`` whose forward returns ``embedding(ids) * embed_scale``. Their kernel is E0 all
the same, so an update of it is scaled as well: y = scale (E0[t] + Σ w s B_f A_f[:, t]), and merging and PEFT agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scale_of(module: nn.Module) -> Tensor | float | None:
    """What a scaled embedding multiplies by; None for others, and for plain ones whatever attributes they have."""
    base = getattr(module, "flix_base", type(module))
    if base is nn.Embedding:
        return None
    if (own := getattr(module, "embed_scale", None)) is not None:
        return own  # type: ignore[no-any-return]
    # An adapted layer is of a class of ours, and what its own class says is looked up there.
    told = getattr(base, "embed_scale", None)
    return told.fget(module) if isinstance(told, property) else told  # type: ignore[no-any-return, misc]


def scaled(module: nn.Module, y: Tensor) -> Tensor:
    """``y`` times the module's scale, where it has one, in the precision of ``y``."""
    scale = scale_of(module)
    if scale is None:
        return y
    return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


def is_scaled_embedding(module: nn.Module) -> bool:
    """Whether a module is an embedding with a forward of its own that does nothing but scale.

    Any class may call an attribute ``embed_scale``; that the forward only multiplies by it is tried with the last
    row (the first is often padding, of zeros), and taken for granted on the meta device, where weights have no values.
    """
    if not isinstance(module, nn.Embedding) or scale_of(module) is None:
        return False
    weight = module.weight
    if weight.is_meta:
        return True
    last = torch.full((1, 1), module.num_embeddings - 1, device=weight.device)
    try:
        with torch.no_grad():
            found = type(module).forward(module, last)
            return torch.equal(found, scaled(module, F.embedding(last, weight)))
    except Exception:  # a forward that wants or gives other things is none that only scales
        return False


def same_scale(one: nn.Module, other: nn.Module) -> bool:
    """Whether two embeddings with one kernel look up the same values."""
    first, second = scale_of(one), scale_of(other)
    if any(isinstance(scale, Tensor) and scale.is_meta for scale in (first, second)):
        return True
    return (first is None and second is None) or bool(first == second)
