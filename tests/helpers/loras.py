"""LoRA files as PEFT writes them, without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file


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
