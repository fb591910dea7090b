"""The script that trained the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LISTS = {"de": ["Haus", "über", "grün", "lesen"], "ka": ["დედა", "სახლი"]}


def test_learning_rate() -> None:
    pretrain = pytest.importorskip("tools.pretrain")
    rates = [pretrain.learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10)
    assert rates[0] == pytest.approx(0.1)
    assert 0 < rates[-1] < 0.05


def test_the_script_trains_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tools import pretrain

    monkeypatch.setattr(pretrain, "word_lists", lambda: LISTS)
    pretrain.main(["--out", str(tmp_path), "--steps", "3", "--batch", "4"])
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["steps"] == 3
    assert 1_000_000 < report["parameters"] < 2_000_000
    assert transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).config.d_model == 128
