"""Cutting a LoRA to a rank, and writing it."""

import numpy as np
import pytest

from flix import ConfigError
from flix.core.peft.exporting import cut_to_rank, write_peft
from tests.helpers.loras import STEM, lora


def _tensors(draw, layers, rank, true_rank):
    tensors = {}
    for path, (d_in, d_out), embedding in layers:
        inner = draw.normal(size=(true_rank, rank))
        a = (np.linalg.pinv(inner) @ draw.normal(size=(true_rank, d_in))).astype("f4")
        b = (draw.normal(size=(d_out, true_rank)) @ inner).astype("f4")
        names = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        for name, tensor in zip(names, (a, b), strict=True):
            tensors[f"{STEM}{path}.lora_{name}"] = tensor
    return tensors


LAYERS = (("a", (30, 20), False), ("e", (50, 12), True), ("narrow", (3, 20), False))


def _delta(tensors, path, embedding):
    names = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
    a, b = (tensors[f"{STEM}{path}.lora_{name}"].astype(float) for name in names)
    return b @ a


def test_cutting_is_the_best_of_its_rank_and_says_what_it_costs():
    draw = np.random.default_rng(0)
    config, _ = lora(10)
    tensors = _tensors(draw, LAYERS, 10, 10)
    before = {name: tensor.copy() for name, tensor in tensors.items()}
    settings, cut, error = cut_to_rank(config, tensors, 4)
    assert settings["r"] == settings["lora_alpha"] == 4 and list(cut) == list(tensors)
    assert config["r"] == 10 and all(np.array_equal(before[n], t) for n, t in tensors.items())
    lost = whole = best = 0.0
    for path, _, embedding in LAYERS:
        old, new = _delta(tensors, path, embedding), _delta(cut, path, embedding)
        lost += np.sum((old - new) ** 2)
        whole += np.sum(old**2)
        best += np.sum(np.linalg.svd(old)[1][4:] ** 2)
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert lost == pytest.approx(best, rel=1e-4) and 0.05 < error < 0.9


def test_cutting_off_zeros_costs_nothing():
    config, _ = lora(10, lora_alpha=5)
    tensors = _tensors(np.random.default_rng(1), LAYERS, 10, 3)
    settings, cut, error = cut_to_rank(config, tensors, 3)
    assert error < 1e-6 and settings["lora_alpha"] / settings["r"] == 0.5
    for path, _, embedding in LAYERS:
        np.testing.assert_allclose(
            _delta(cut, path, embedding), _delta(tensors, path, embedding), atol=1e-4
        )


def test_a_small_rank_is_left_alone():
    config, _ = lora(4)
    tensors = _tensors(np.random.default_rng(2), LAYERS, 4, 4)
    settings, cut, error = cut_to_rank(config, tensors, 8)
    assert settings == config and error == 0.0
    assert all(cut[name] is tensor for name, tensor in tensors.items())


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_ill_formed_ranks(rank):
    with pytest.raises(ConfigError, match="whole number of 1 or more"):
        cut_to_rank(*lora(4), rank)


def test_what_is_written_says_the_same(tmp_path):
    config, _ = lora(10, base_model_name_or_path="my/base")
    tensors = _tensors(np.random.default_rng(0), LAYERS[:1], 10, 10)
    settings, cut, error = cut_to_rank(config, tensors, 4)
    result = write_peft(
        tmp_path / "sw", settings, cut, error=error, architecture="LlamaForCausalLM"
    )
    assert result.rank == 4 and result.layers == 1 and result.max_lora_rank == 8
    assert f"relative error is {error:.2e}" in result.message
    assert (
        f"vllm serve my/base --enable-lora --max-lora-rank 8 --lora-modules sw={tmp_path}/sw"
        in (result.message)
    )
    whole = write_peft(tmp_path / "sw", config, tensors, architecture="GPT2LMHeadModel")
    assert "relative error" not in whole.message and "would not serve" in whole.message
