"""Ray Train with two workers on one machine; the example, one of whose workers is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("ray.train")

from tests.helpers.processes import ROOT, run_together

WORKER = "tests.backends.torch.distributed.ray_worker"


@pytest.mark.slow
def test_ray_restarts_a_killed_worker_and_ends_at_the_bits_of_plain_processes(
    tmp_path: Path,
) -> None:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", WORKER, "ray", str(tmp_path / "ray")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "two workers trained; the last checkpoint: step-9" in done.stdout
    assert (tmp_path / "ray" / "killed").exists()
    run_together(2, WORKER, "plain", str(tmp_path / "plain"), timeout=200)
    one, two = (tmp_path / kind / "adapter" / "flix.safetensors" for kind in ("ray", "plain"))
    assert one.read_bytes() == two.read_bytes()
