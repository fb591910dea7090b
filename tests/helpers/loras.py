"""LoRA files as PEFT writes them, without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

STEM = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


def lora(
    rank: int = 4, *paths: str, embeddings: tuple[str, ...] = (), **changes: Any
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A plain LoRA's configuration and shapes; keywords replace settings."""
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "modules_to_save": None,
        **changes,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths or (Q,):
        shapes[f"{STEM}{path}.lora_A.weight"] = (rank, 16)
        shapes[f"{STEM}{path}.lora_B.weight"] = (24, rank)
    for path in embeddings:
        shapes[f"{STEM}{path}.lora_embedding_A"] = (rank, 40)
        shapes[f"{STEM}{path}.lora_embedding_B"] = (16, rank)
    return config, shapes


def write_lora(folder: Path, pairs: dict[str, tuple[Any, Any]], alpha: float) -> Path:
    """A LoRA as PEFT's ``save_pretrained`` writes it."""
    folder.mkdir()
    rank = next(iter(pairs.values()))[0].shape[0]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for path, (a, b) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
