"""Two processes give the single-process result, with different features in each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[4]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


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
def test_two_processes_equal_one(worker, kind):
    if kind == "tp":
        pytest.importorskip("transformers.distributed.tensor_parallel")
    port = _free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.backends.torch.distributed.{worker}", kind]
    workers = [
        subprocess.Popen(
            [*command, str(rank), port],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, text in zip(workers, texts, strict=True):
        assert worker.returncode == 0 and "same as one process" in text, text
