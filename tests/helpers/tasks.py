"""Tiny models and tokenizers in folders, and rows of tasks: what the tests of tasks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as tf

import flix
from flix.transformers import FlixCollator

CHAT = (
    "{{ bos_token or '' }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{{ '</s>' if m['role'] == 'assistant' else '|' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LANGUAGES = ("hau", "swa")
TASKS = ("ner", "topic", "rate", "text")


def written(folder: Path, kind: str) -> Path:
    """A folder with a byte-level model that writes its answers, with random weights, and its tokenizer."""
    import torch

    torch.manual_seed(0)
    if kind == "t5":
        model: Any = tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=384, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
                dropout_rate=0.0,
            )
        )  # fmt: skip
    else:
        model = tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=1,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tf.ByT5Tokenizer().save_pretrained(folder)
    return folder


def config_of(**changes: Any) -> flix.FlixConfig:
    """A configuration over languages and tasks."""
    registry = flix.FeatureRegistry({"language": LANGUAGES, "task": TASKS})
    return flix.FlixConfig(**{"registry": registry, "ranks": 2, "init": "uniform", **changes})


def collator_of(config: flix.FlixConfig, inner: Any) -> FlixCollator:
    """A collator that drops no features."""
    return FlixCollator(config, inner, feature_dropout=None)
