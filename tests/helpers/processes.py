"""Several processes of one test: each runs a module of the tests as a program, and all must end well."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_together(
    count: int,
    module: str,
    *arguments: str,
    timeout: float = 120,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """What each process printed; they find each other by the environment, as torchrun's would."""
    common = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        **(environment or {}),
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        texts = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    failed = [text for worker, text in zip(workers, texts, strict=True) if worker.returncode != 0]
    assert not failed, failed[0]
    return texts
