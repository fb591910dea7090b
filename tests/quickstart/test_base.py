"""The shipped base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import flix.quickstart
from tools import tokens

BASE = Path(flix.quickstart.__file__).parent / "base"


@pytest.fixture(scope="module")
def base() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.T5ForConditionalGeneration.from_pretrained(BASE).float().eval()


def test_base_is_small_and_has_its_card() -> None:
    assert (BASE / "model.safetensors").stat().st_size <= 4 * 2**20
    card = (BASE / "README.md").read_text(encoding="utf-8")
    for word in ("CC BY-SA 4.0", "seed", "steps", "minutes", "tools.pretrain"):
        assert word in card


def test_base_repairs_words(base: Any) -> None:
    import torch

    lines = ["international", "Donnerstag", "республика", "1987-03-21", "university"]
    ids, mask = map(torch.from_numpy, tokens.encode([f"fix: {line}" for line in lines]))
    with torch.no_grad():
        out = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert sum(a == b for a, b in zip(tokens.decode(out.numpy()), lines, strict=True)) >= 3


def test_its_tokenizer_is_the_one_that_it_was_trained_with() -> None:
    transformers = pytest.importorskip("transformers")
    own = transformers.AutoTokenizer.from_pretrained(BASE)
    texts = ["num: zwölf", "ქართული", "Ełk 北"]
    assert len(own) == tokens.VOCABULARY
    for text in texts:
        assert own(text)["input_ids"] == tokens.encode([text])[0][0].tolist()
    assert own.convert_tokens_to_ids("<extra_id_0>") == tokens.FIRST_SENTINEL


def test_base_parameters(base: Any) -> None:
    assert 1_000_000 <= base.num_parameters() <= 2_000_000
    assert base.config.vocab_size == tokens.VOCABULARY
    assert base.config.dropout_rate <= 0.1
