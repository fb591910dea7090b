"""LoRAs of nn.MultiheadAttention between their kernels' paths and PEFT's nesting."""

from __future__ import annotations

import numpy as np
import pytest

from flix import AdapterError
from flix.core.peft.attention import as_attention, of_attention

STEM = "base_model.model."


def pair(rank=2, width=4):
    a = np.arange(rank * width, dtype=np.float32).reshape(rank, width) + 1
    return a, np.arange(3 * width * rank, dtype=np.float32).reshape(3 * width, rank) + 1


def test_packed_projections_bear_the_modules_name_beside_zeros_for_the_output():
    a, b = pair()
    given = {
        f"{STEM}x.attn.in_proj_weight.lora_A.weight": a,
        f"{STEM}x.attn.in_proj_weight.lora_B.weight": b,
        f"{STEM}x.ffn.lora_A.weight": a,
    }
    made = as_attention(given, ["x.attn"])
    assert set(made) == {
        f"{STEM}x.attn.lora_A.weight", f"{STEM}x.attn.lora_B.weight", f"{STEM}x.ffn.lora_A.weight",
        f"{STEM}x.attn.base_layer.out_proj.lora_A.weight", f"{STEM}x.attn.base_layer.out_proj.lora_B.weight",
    }  # fmt: skip
    assert made[f"{STEM}x.attn.lora_A.weight"] is a and made[f"{STEM}x.attn.lora_B.weight"] is b
    out = [made[f"{STEM}x.attn.base_layer.out_proj.lora_{side}.weight"] for side in "AB"]
    assert [t.shape for t in out] == [(2, 4), (4, 2)] and not any(t.any() for t in out)
    assert all(t.dtype == np.float32 for t in out) and len(given) == 3


def test_there_and_back_the_paths_are_the_kernels():
    a, b = pair()
    zeros = np.zeros((2, 4), np.float32), np.zeros((4, 2), np.float32)
    pairs = {"x.attn": (a, b), "x.attn.base_layer.out_proj": zeros, "x.ffn": (a, b)}
    assert of_attention(pairs) == {"x.attn": "x.attn.in_proj_weight", "x.ffn": "x.ffn"}


def test_an_output_projection_that_acts_is_refused():
    a, b = pair()
    pairs = {"x.attn": (a, b), "x.attn.base_layer.out_proj": (a, np.ones((4, 2), np.float32))}
    with pytest.raises(
        AdapterError,
        match=r"layer 'x\.attn\.out_proj' is the output's projection of nn\.MultiheadAttention, whose LoRA PEFT \(0\.21\) adds "
        "twice: .* another update",
    ):
        of_attention(pairs)
