"""Pairs of convolutions between matrices and the form of PEFT's files."""

from __future__ import annotations

import numpy as np
import pytest

from flix.core.peft.convolutions import as_convolutions, as_matrices

STEM = "base_model.model.net.conv"


def pair(rank=2, patch=3 * 2 * 4, d_out=5):
    a = np.arange(rank * patch, dtype=np.float32).reshape(rank, patch)
    return a, np.arange(d_out * rank, dtype=np.float32).reshape(d_out, rank)


def test_there_and_back_nothing_changes():
    a, b = pair()
    given = {
        f"{STEM}.lora_A.weight": a,
        f"{STEM}.lora_B.weight": b,
        "base_model.model.out.lora_A.weight": a,
    }
    made = as_convolutions(given, {"net.conv": (2, 4)})
    assert made[f"{STEM}.lora_A.weight"].shape == (2, 3, 2, 4)
    assert made[f"{STEM}.lora_A.weight"][1, 2, 1, 3] == a[1, -1]
    assert made[f"{STEM}.lora_B.weight"].shape == (5, 2, 1, 1)
    assert made["base_model.model.out.lora_A.weight"] is a
    assert given[f"{STEM}.lora_A.weight"] is a
    back = as_matrices({"A": made[f"{STEM}.lora_A.weight"], "B": made[f"{STEM}.lora_B.weight"]})
    np.testing.assert_array_equal(back["A"], a)
    np.testing.assert_array_equal(back["B"], b)


@pytest.mark.parametrize(
    "parts",
    [
        {"A": np.zeros((2, 3)), "B": np.zeros((5, 2))},
        {"A": np.zeros((2, 3, 2)), "B": np.zeros((5, 2, 3))},
        {"A": np.zeros((2, 3, 2)), "B": np.zeros((5, 2))},
        {"A": np.zeros((2, 3, 1, 1, 1, 1)), "B": np.zeros((5, 2, 1, 1, 1, 1))},
        {"A": np.zeros((2, 3, 2))},
    ],
)
def test_what_is_no_pair_of_a_convolution_stays(parts):
    assert all(value is parts[side] for side, value in as_matrices(parts).items())
