"""A mixture of experts in two processes gives the single-process result, however its features are shared."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.helpers.processes import run_together


@pytest.mark.slow
def test_two_processes_equal_one() -> None:
    for text in run_together(2, "tests.backends.torch.distributed.experts_worker", timeout=300):
        for kind in ("reduced", "sharded", "fsdp", "ddp"):
            assert f"same as one process: {kind}" in text, text
