"""FSDP2 by the Trainer's and accelerate's own arguments, two processes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.helpers.processes import run_together


@pytest.mark.slow
def test_two_processes_equal_ddp_and_one(tmp_path: Path) -> None:
    for text in run_together(2, "tests.transformers.fsdp_worker", str(tmp_path), timeout=400):
        assert "the same" in text, text
