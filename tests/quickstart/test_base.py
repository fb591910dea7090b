"""The denoising pairs, the training script and the shipped base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flix.quickstart
from flix.quickstart import noise, tokens, words

BASE = Path(flix.quickstart.__file__).parent / "base"
LISTS = {"de": ["Haus", "über", "grün", "lesen"], "ka": ["დედა", "სახლი"]}


def _fill_in(source: list[int], target: list[int]) -> list[int]:
    """Put what span corruption took out back in its place."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= tokens.FIRST_SENTINEL:
            spans[token] = []
            current = spans[token]
        else:
            current.append(token)
    return [part for token in source[:-1] for part in spans.get(token, [token])]


def test_span_corruption_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    sampler = noise.LineSampler(LISTS, {}, rng)
    for _ in range(300):
        line = sampler.line()
        assert 0 < len(line.encode()) <= noise.MAX_LINE_BYTES
        source, target = noise.corrupt_spans(line, rng)
        assert max(source + target) < tokens.VOCABULARY
        assert len(target) > 2
        assert tokens.decode([_fill_in(source, target)]) == [line]


def test_repair_targets_are_the_clean_line() -> None:
    rng = np.random.default_rng(1)
    changed = 0
    for _ in range(300):
        source, target = noise.denoising_pair("Haus über lesen", rng, span_share=0.0)
        assert tokens.decode([target]) == ["Haus über lesen"]
        changed += source[-len(target) :] != target
    assert changed > 200


def test_words() -> None:
    pytest.importorskip("wordfreq")
    german = words.words("de", 500)
    assert "und" in german[:20]
    welsh = words.words("cy", 300)
    assert len(welsh) == len(set(welsh)) == 300
    assert all(words.is_word(word) for word in german + welsh)
    assert words.lemma_dictionary("id").get("berambut") == "rambut"


def test_another_simplemma_layout_is_read_the_public_way(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary_factory = pytest.importorskip("simplemma.strategies.dictionaries.dictionary_factory")
    direct = list(words._records("id", 2000, 50))
    monkeypatch.delattr(dictionary_factory, "_read_decompressed")
    words.lemma_dictionary.cache_clear()
    table = {"a": "b", "c": "d", "e": "f"}
    monkeypatch.setattr(words, "lemma_dictionary", lambda language: table)
    assert len(direct) == 40
    assert list(words._records("id", 3, 2)) == [("a", "b"), ("e", "f")]


def test_learning_rate() -> None:
    pretrain = pytest.importorskip("flix.quickstart.pretrain")
    rates = [pretrain.learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10)
    assert rates[0] == pytest.approx(0.1)
    assert 0 < rates[-1] < 0.05


def test_the_script_trains_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from flix.quickstart import pretrain

    monkeypatch.setattr(pretrain, "word_lists", lambda: LISTS)
    pretrain.main(["--out", str(tmp_path), "--steps", "3", "--batch", "4"])
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["steps"] == 3
    assert 1_000_000 < report["parameters"] < 2_000_000
    assert transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).config.d_model == 128


@pytest.fixture(scope="module")
def base() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.T5ForConditionalGeneration.from_pretrained(BASE).float().eval()


def test_base_is_small_and_has_its_card() -> None:
    assert (BASE / "model.safetensors").stat().st_size <= 4 * 2**20
    card = (BASE / "README.md").read_text(encoding="utf-8")
    for word in ("CC BY-SA 4.0", "seed", "steps", "minutes", "flix.quickstart.pretrain"):
        assert word in card


def test_base_repairs_words(base: Any) -> None:
    import torch

    lines = ["international", "Donnerstag", "республика", "1987-03-21", "university"]
    ids, mask = map(torch.from_numpy, tokens.encode([f"fix: {line}" for line in lines]))
    with torch.no_grad():
        out = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert sum(a == b for a, b in zip(tokens.decode(out.numpy()), lines, strict=True)) >= 3


def test_base_parameters(base: Any) -> None:
    assert 1_000_000 <= base.num_parameters() <= 2_000_000
    assert base.config.vocab_size == tokens.VOCABULARY
    assert base.config.dropout_rate <= 0.1
