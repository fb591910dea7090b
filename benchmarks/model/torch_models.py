"""Torch models of real architectures with random weights, plain, under flix and under PEFT's ways to route rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.layer.problem import RANK, Feature
from benchmarks.model.problem import LORA_RANK, MixedBatch, randomized
from benchmarks.torch_gradients import adapted_layers
from flix.backends.torch import adapt, load_into, to_adapter

Make = Callable[[], nn.Module]


def t5_small(smoke: bool = False) -> nn.Module:
    """An encoder-decoder of T5-small's sizes, without dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128}
    if smoke:
        sizes = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 128}
    torch.manual_seed(0)
    config = T5Config(d_kv=sizes["d_model"] // sizes["num_heads"], dropout_rate=0.0, **sizes)
    config.decoder_start_token_id = config.pad_token_id = 0
    return T5ForConditionalGeneration(config)


def gpt2_small(smoke: bool = False) -> nn.Module:
    """A decoder of GPT-2-small's sizes, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
    if smoke:
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 128}
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(bos_token_id=1, eos_token_id=1, pad_token_id=0, **none, **sizes)
    return GPT2LMHeadModel(config)


def adapter(features: Feature | Sequence[Feature]) -> str:
    """PEFT's name of the adapter of a feature, or of a composition."""
    if isinstance(features[0], str):
        return "-".join(features)  # type: ignore[arg-type]
    return "+".join(map(adapter, features))  # type: ignore[arg-type]


def flix_model(make: Make, batch: MixedBatch) -> nn.Module:
    """The model adapted by flix, with updates that are not zero."""
    model = adapt(make(), batch.config)
    return load_into(model, randomized(to_adapter(model)))


def frozen_model(make: Make) -> nn.Module:
    """The frozen model; its embeddings require gradients, so that backward runs through every layer to the input."""
    model = make().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == model.config.hidden_size:
            module.register_forward_hook(require_grad)
    return model


def require_grad(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    """A forward hook that lets backward run to a frozen module's output."""
    return out.requires_grad_(True) if torch.is_grad_enabled() else out


def _config(rank: int, **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="all-linear",
        init_lora_weights=False,
        lora_dropout=0.0,
        **more,
    )


def task_type(model: nn.Module) -> str:
    """PEFT's: Poly passes its task ids on under a task type only."""
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def peft_single(make: Make) -> nn.Module:
    """One LoRA for all rows, of the rank that a row's two features have together."""
    from peft import get_peft_model

    model = make()
    return get_peft_model(model, _config(LORA_RANK, task_type=task_type(model)))


def peft_features(make: Make, batch: MixedBatch, like: nn.Module | None = None) -> Any:
    """PEFT with an adapter for each feature in the batch.

    Args:
        make: the model's maker.
        batch: its features.
        like: a model adapted by flix, whose pairs are copied.
    """
    from peft import get_peft_model

    base = make()
    kind = task_type(base)
    names = {feature: adapter(feature) for feature in batch.features}
    first, *others = names.values()
    model = get_peft_model(base, _config(RANK, task_type=kind), adapter_name=first)
    for name in others:
        model.add_adapter(name, _config(RANK, task_type=kind))
    if like is not None:
        with torch.no_grad():
            for path, layer in adapted_layers(like):
                twin = model.base_model.model.get_submodule(path)
                for feature, name in names.items():
                    twin.lora_A[name].weight.copy_(layer.flix_A[feature])
                    twin.lora_B[name].weight.copy_(layer.flix_B[feature])
    return model


def peft_compositions(features: Any, batch: MixedBatch) -> Any:
    """The model with one adapter a composition more, its features' concatenated: the same sums, for inference only.

    Adapters that no row names cost nothing in a forward by ``adapter_names``, so that the model serves both ways.
    """
    for row in batch.groups:
        features.add_weighted_adapter(
            [adapter(feature) for feature in row], [1.0, 1.0], adapter(row), combination_type="cat"
        )
    return features


def peft_poly(make: Make, batch: MixedBatch) -> Any:
    """Poly: as many tasks as compositions, as many skills as features, each row's A and B of the LoRA's rank."""
    from peft import PolyConfig, get_peft_model

    model = make()
    config = PolyConfig(
        r=LORA_RANK,
        n_tasks=len(batch.groups),
        n_skills=len(batch.registry),
        n_splits=1,
        target_modules="all-linear",
        init_weights=False,
        task_type=task_type(model),
    )
    return get_peft_model(model, config)


def task_ids(batch: MixedBatch) -> torch.Tensor:
    """Poly's routing: the number of each row's composition."""
    numbers = {row: i for i, row in enumerate(batch.groups)}
    return torch.tensor([numbers[row] for row in batch.rows])
