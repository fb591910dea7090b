"""Bases with so many positions: what they reserve, and texts that are cut there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from flix.tasks import make_task
from flix.tasks.errors import ModelError
from flix.tasks.positions import positions, within_positions

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 300}  # fmt: skip
TWO = {
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1,
    "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 300,
}  # fmt: skip
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
MADE: dict[str, Any] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**SMALL, max_position_embeddings=20)),
    "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**SMALL, max_position_embeddings=22)),
    "opt": lambda: tf.OPTModel(tf.OPTConfig(hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=300, word_embed_proj_dim=8, max_position_embeddings=20)),
    "gpt2": lambda: tf.GPT2Model(tf.GPT2Config(**GPT2, n_positions=20)),
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(**SMALL, max_position_embeddings=20)),
    "bart": lambda: tf.BartModel(tf.BartConfig(**TWO, max_position_embeddings=20)),
    "t5": lambda: tf.T5Model(tf.T5Config(d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=300)),
}  # fmt: skip


@pytest.mark.parametrize("kind", MADE)
def test_the_longest_text_that_a_base_reads(kind: str) -> None:
    model = MADE[kind]().eval()
    first, second = positions(model)
    assert first == (None if kind in ("llama", "t5") else 20)
    assert second == (20 if kind == "bart" else None)
    more = {"decoder_input_ids": torch.full((1, first or 30), 5)} if kind in ("bart", "t5") else {}
    with torch.no_grad():
        model(input_ids=torch.full((1, first or 30), 5), **more)
        if first is not None:
            with pytest.raises((RuntimeError, IndexError)):
                model(input_ids=torch.full((1, first + 1), 5), **more)


def test_texts_are_cut_or_what_was_asked_for_is_refused() -> None:
    def cut(kind: str, model: Any, source: int = 512, target: int = 256, asked: Any = (False, False)) -> Any:  # fmt: skip
        more = {"labels": ["a"]} if kind == "classification" else {}
        task = make_task(kind, tokenizer, name="x", max_source=source, max_target=target, **more)
        (found,), notes = within_positions(model, [task], asked)
        return found.max_source, found.max_target, notes

    tokenizer = tf.ByT5Tokenizer()
    bert, gpt2, bart, t5 = (MADE[kind]() for kind in ("bert", "gpt2", "bart", "t5"))
    source, target, notes = cut("classification", bert)
    assert (source, target) == (20, 256)
    assert notes == ["the base has positions for 20 tokens; training.max_source_tokens is 20 instead of 512, longer texts are cut there"]  # fmt: skip
    assert cut("classification", bert, 20) == (20, 256, [])
    with pytest.raises(
        ModelError, match="max_source_tokens is 21, but the base has positions for 20"
    ):
        cut("classification", bert, 21, asked=(True, False))
    assert cut("seq2seq", t5) == (512, 256, [])
    source, target, notes = cut("seq2seq", bart)
    assert (source, target, len(notes)) == (20, 20, 2)
    with pytest.raises(ModelError, match="max_target_tokens is 30"):
        cut("seq2seq", bart, 20, 30, asked=(True, True))
    # A causal model reads both in one row.
    assert cut("causal", gpt2)[:2] == (10, 10)
    assert cut("causal", gpt2, 15, asked=(True, False))[:2] == (15, 5)
    assert cut("causal", gpt2, 512, 4, asked=(False, True))[:2] == (16, 4)
    assert cut("causal", gpt2, 16, 4, asked=(True, True)) == (16, 4, [])
    for wrong in ((17, 4, (True, True)), (19, 256, (True, False)), (512, 19, (False, True))):
        with pytest.raises(ModelError, match="together they are that many or less"):
            cut("causal", gpt2, *wrong)
