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


LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), "ga", "##da"]  # fmt: skip


def piece_tokenizer(marks: bool = True) -> Any:
    """Word pieces of one or two letters, with the marks of an encoder or without any."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {piece: place for place, piece in enumerate(PIECES)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=40))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if marks:
        inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if marks:
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


_ENCODER = {
    "vocab_size": len(PIECES), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def encoder(folder: Path, kind: str) -> Path:
    """A folder with a tiny encoder (with its head that fills masks), or a decoder, with random weights; word pieces."""
    import torch

    torch.manual_seed(0)
    if kind == "bert":
        model: Any = tf.BertForMaskedLM(tf.BertConfig(**_ENCODER))
    elif kind == "roberta":
        model = tf.XLMRobertaForMaskedLM(tf.XLMRobertaConfig(**_ENCODER))
    elif kind == "distilbert":
        model = tf.DistilBertForMaskedLM(
            tf.DistilBertConfig(vocab_size=len(PIECES), dim=16, hidden_dim=24, n_layers=2, n_heads=2, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, initializer_range=0.3, pad_token_id=0)
        )  # fmt: skip
    elif kind == "t5":
        model = tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=len(PIECES), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0)
        )  # fmt: skip
    else:
        model = tf.LlamaForCausalLM(
            tf.LlamaConfig(vocab_size=len(PIECES), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None)
        )  # fmt: skip
    model.save_pretrained(folder)
    piece_tokenizer(kind not in ("llama", "t5")).save_pretrained(folder)
    return folder


HEADED_ROWS: list[dict[str, Any]] = [
    {"tokens": ["gada", "ba", "xyz"], "tags": ["B-PER", "I-PER", "O"], "flix_task": 0, "task": "ner", "language": "hau"},
    {"text": "ga ba", "target": "news", "flix_task": 1, "task": "topic", "language": "swa"},
    {"text": "maji moto sana", "target": "sport", "flix_task": 1, "task": "topic", "language": "hau"},
    {"text": "ruwa", "target": 1.5, "flix_task": 2, "task": "rate", "language": "hau"},
    {"text": "kogi da ruwa", "target": -0.5, "flix_task": 2, "task": "rate", "language": "swa"},
    {"text": "maji na moto kwa gari moja", "flix_task": 3, "task": "text", "language": "swa"},
    {"tokens": ["a", "gada"], "tags": ["O", "B-LOC"], "flix_task": 0, "task": "ner", "language": "swa"},
]  # fmt: skip


def headed_tasks(tokenizer: Any, masked: bool = True, **settings: Any) -> list[Any]:
    """Tagging, classification, regression and masked texts, as the rows number them."""
    from flix.tasks import make_task

    source = {"source": "text"}
    tasks = [
        make_task("tagging", tokenizer, name="ner", labels=["B-LOC", "B-PER", "I-PER", "O"], **settings),
        make_task("classification", tokenizer, name="topic", columns=source, labels=["news", "sport"], **settings),
        make_task("regression", tokenizer, name="rate", columns=source, **settings),
    ]  # fmt: skip
    if masked:
        tasks.append(make_task("masked", tokenizer, name="text", columns=source, **settings))
    return tasks


def shaken(model: Any, size: float = 0.3) -> Any:
    """An adapted model whose features act."""
    import torch

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.flix_bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model
