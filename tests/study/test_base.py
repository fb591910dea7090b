"""A base that was pretrained for a study stands beside its scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flix.study import scores
from flix.study.base import PRETRAINING
from flix.study.evidence import EvidenceError
from flix.study.results import keep, write_results
from tests.study.test_results import block, page, study

RECORD = {
    "seed": 0,
    "parameters": 17_812_096,
    "architecture": {"num_layers": 6, "num_decoder_layers": 3, "d_model": 384},
    "words": 90_210,
    "languages": ["deu", "fra"],
    "steps": 5_000,
    "seconds": 238.4,
    "tokens_a_second": 1_234_567,
    "final_loss": 0.71234,
    "device": "Some Card",
    "precision": "bfloat16 autocast",
    "dry_run": False,
}


def with_record(folder: Path, **changes: Any) -> Path:
    (folder / PRETRAINING).write_text(json.dumps({**RECORD, **changes}), encoding="utf-8")
    return folder


def test_the_record_is_kept_and_its_table_filled(tmp_path: Path) -> None:
    file = page(tmp_path, "gpu base", "gpu main")
    assert write_results([with_record(study(tmp_path, "gpu"))], docs=file, draws=50) == {}
    told = block(file, "gpu base")
    row = "| 6 + 3 layers, width 384 | 17,812,096 | 90,210 | 2 | 5,000 | 238 | 1,234,567 | 0.712 |"
    assert row in told and "Pretrained on Some Card, bfloat16 autocast." in told
    assert "results/gpu.json" in told and "| flix" in block(file, "gpu main")


def test_without_a_run_the_page_says_so(tmp_path: Path) -> None:
    file = page(tmp_path, "gpu base", "words base")
    missing = write_results([study(tmp_path, "words")], docs=file, draws=50)
    assert missing["gpu base"] == "no run yet: `make gpu-study`"
    assert missing["words base"] == "no base was pretrained for the study 'words'"


def test_a_dry_run_is_not_kept(tmp_path: Path) -> None:
    folder = with_record(study(tmp_path, "gpu"), dry_run=True)
    with pytest.raises(EvidenceError, match="is a dry run, whose figures mean nothing"):
        keep(folder, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_machine_names_what_the_runs_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scores.machine_of([])["device"] == "cpu"
    assert scores.machine_of(["cpu", "mps:0"])["device"] == "cpu, mps:0"
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card of {device}")
    assert scores.machine_of(["cuda:0", "cuda:0"])["device"] == "Card of cuda:0"

    def none(device: str) -> str:
        raise RuntimeError("no CUDA")

    monkeypatch.setattr(torch.cuda, "get_device_name", none)
    assert scores.machine_of(["cuda:0"])["device"] == "cuda:0"
