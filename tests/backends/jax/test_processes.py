"""Two processes of ``jax.distributed`` train, keep and write what one does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("flax.nnx")

from tests.helpers.processes import run_together


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    worker = "tests.backends.jax.processes_worker"
    for text in run_together(2, worker, str(tmp_path), timeout=600, environment=environment):
        assert "same as one process" in text, text[-5000:]
