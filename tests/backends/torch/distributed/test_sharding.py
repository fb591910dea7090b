"""Sharded features: two and four processes hold an equal part each, and give the single-process result."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.helpers.processes import run_together

WORKER = "tests.backends.torch.distributed.sharding_worker"


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_equal_one(count: int, tmp_path: Path) -> None:
    """The base whole in every process, under fully_shard, and its head under DDP."""
    for text in run_together(count, WORKER, str(tmp_path), "alone", "fsdp", "ddp", timeout=300):
        assert "same as one process" in text, text
