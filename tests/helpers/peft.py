"""LoRAs that PEFT makes itself, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.helpers.torch import batch, make, output  # noqa: E402

Lora = Callable[..., Any]


def make_lora(name: str, folder: Path, seed: int = 0, **settings: Any) -> Any:
    """A LoRA with random values, saved by PEFT; what PEFT's own model of it gives for ``batch(name)``."""
    model = peft.get_peft_model(make(name), peft.LoraConfig(**settings))
    fill(model, seed)
    model.save_pretrained(folder)
    return answer(name, folder)


def fill(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(noise * 0.1)


def answer(name: str, folder: Path, rows: int = 4) -> Any:
    """The output of PEFT's model of a saved LoRA, in float64."""
    opened = peft.PeftModel.from_pretrained(make(name), folder).double().eval()
    with torch.no_grad():
        return output(opened(**batch(name, rows)))
