"""Two processes give the single-process result, with different features in each."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.helpers.processes import run_together


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worker", "kind"),
    [
        ("distributed_worker", "ddp"),
        ("distributed_worker", "fsdp"),
        ("tensor_parallel_worker", "tp"),
        ("tensor_parallel_worker", "hooks"),
    ],
)
def test_two_processes_equal_one(worker: str, kind: str) -> None:
    if kind == "tp":
        pytest.importorskip("transformers.distributed.tensor_parallel")
    for text in run_together(2, f"tests.backends.torch.distributed.{worker}", kind, timeout=180):
        assert "same as one process" in text, text
