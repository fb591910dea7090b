"""A composition as one LoRA in PEFT's file format, exactly: pure, in numpy.

The names and rules are PEFT's (checked against 0.21): keys ``base_model.model.<path>.lora_A.weight``, embeddings
``lora_embedding_A``; one rank for all layers, since servers are reported to ignore ``rank_pattern``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.adapter import Adapter, Path_, _write_aside
from flix.core.composition import Composition, lora_pair
from flix.core.errors import AdapterError, listed

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class PeftExport:
    """What was exported.

    Attributes:
        rank: the LoRA's rank, r.
        max_lora_rank: the least value of vLLM's ``--max-lora-rank`` that serves it; None above 512.
        layers: the number of layers.
    """

    rank: int
    max_lora_rank: int | None
    layers: int

    @property
    def message(self) -> str:
        """What to tell the user about serving."""
        if self.max_lora_rank is None:
            return (
                f"rank {self.rank} exceeds the largest that vLLM serves ({VLLM_RANKS[-1]}); merge the "
                "composition into the base instead, or train with smaller ranks"
            )
        return f"to serve with vLLM: --enable-lora --max-lora-rank {self.max_lora_rank}"


def as_peft(
    adapter: Adapter,
    active: Composition,
    *,
    target_modules: Sequence[str] | None = None,
    fan_in_fan_out: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """The composition as PEFT's configuration and tensors.

    Layers of unequal total rank are padded with zeros to the largest; alpha equals the rank, so PEFT's scale is 1.

    Args:
        adapter: the adapter.
        active: the composition.
        target_modules: PEFT's list of suffixes; default: the layers' full paths.
        fan_in_fan_out: whether layers are transformers' Conv1D.
        base_model: the base model's name or folder.
        task_type: PEFT's task type.

    Raises:
        AdapterError: the composition has no update in any layer.
    """
    pairs = {layer: lora_pair(adapter, layer, active) for layer in adapter.layers}
    rank = max((a.shape[0] for a, _ in pairs.values()), default=0)
    if rank == 0:
        names = listed(":".join(feature) for feature, _ in active)
        raise AdapterError(f"nothing to export: {names} have rank 0 in every layer")
    tensors: dict[str, NDArray[np.float32]] = {}
    for layer, (a, b) in pairs.items():
        missing = rank - a.shape[0]
        a = np.pad(a, ((0, missing), (0, 0))).astype(np.float32)
        b = np.pad(b, ((0, 0), (0, missing))).astype(np.float32)
        stem = f"base_model.model.{layer}"
        if adapter.layers[layer].kind == "embedding":
            tensors[f"{stem}.lora_embedding_A"], tensors[f"{stem}.lora_embedding_B"] = a, b
        else:
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": list(target_modules or adapter.layers),
        "inference_mode": True,
    }
    return config, tensors


def write_peft(
    directory: Path_, config: dict[str, Any], tensors: dict[str, NDArray[np.float32]]
) -> PeftExport:
    """Write a folder that PEFT opens: adapter_config.json and adapter_model.safetensors."""
    import os

    from safetensors.numpy import save

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
    data = save(contiguous, metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    for name, content in (("adapter_model.safetensors", data), ("adapter_config.json", text)):
        raw = content if isinstance(content, bytes) else content.encode()
        os.replace(_write_aside(folder, name, raw), folder / name)
    rank = int(config["r"])
    served = next((r for r in VLLM_RANKS if r >= rank), None)
    return PeftExport(rank=rank, max_lora_rank=served, layers=len(tensors) // 2)
