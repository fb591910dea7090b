"""LoRAs of ``nn.MultiheadAttention`` in PEFT's files: it wraps the module, and both projections at once.

The packed projections' pair bears the module's own name, that of ``out_proj`` stands below ``base_layer``. PEFT (0.21)
adds the latter to its kernel twice, in forwards and in ``merge``; so only packed projections go in and out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import AdapterError

Pair = tuple[NDArray[Any], NDArray[Any]]

_PACKED, _OUT = "in_proj_weight", "out_proj"
_BELOW = ".base_layer." + _OUT


TWICE = "is the output's projection of nn.MultiheadAttention, whose LoRA PEFT (0.21) adds twice"


def as_attention(
    tensors: Mapping[str, NDArray[np.float32]], modules: Collection[str]
) -> dict[str, NDArray[np.float32]]:
    """A LoRA whose pairs of packed projections have PEFT's names, beside pairs of zeros for ``out_proj``.

    Args:
        tensors: PEFT's tensors, by the paths of the kernels.
        modules: the paths of the attentions.
    """
    made = dict(tensors)
    for path in modules:
        stem = f"base_model.model.{path}"
        a, b = (made.pop(f"{stem}.{_PACKED}.lora_{side}.weight") for side in "AB")
        made[f"{stem}.lora_A.weight"], made[f"{stem}.lora_B.weight"] = a, b
        made[f"{stem}{_BELOW}.lora_A.weight"] = np.zeros_like(a)
        made[f"{stem}{_BELOW}.lora_B.weight"] = np.zeros((a.shape[1], a.shape[0]), np.float32)
    return made


def of_attention(pairs: Mapping[str, Pair]) -> dict[str, str]:
    """The path of the kernel that each pair is for, by PEFT's path; an ``out_proj`` without effect has none.

    Raises:
        AdapterError: an ``out_proj`` with a pair that acts.
    """
    found = {}
    for path, (_, b) in pairs.items():
        if path.endswith(_BELOW):
            if b.any():
                raise AdapterError(
                    f"layer {path.removesuffix(_BELOW) + '.' + _OUT!r} {TWICE}: what it was trained as is not what its file "
                    "says; a feature of it would compute another update"
                )
        else:
            found[path] = f"{path}.{_PACKED}" if path + _BELOW in pairs else path
    return found
