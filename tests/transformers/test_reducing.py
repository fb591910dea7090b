"""torchrun and ``accelerate launch`` run trainers and a loop in two processes: as one does with whole batches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.helpers.processes import ROOT, free_port  # noqa: E402

MODULE = "tests.transformers.reducing_worker"
TRAINERS = ("features", "heads", "accumulated")
LOOP = ("accelerate",)
pytestmark = pytest.mark.slow


def run(folder: Path, kinds: Sequence[str], *launcher: str) -> list[dict[str, Any]]:
    """What each process ended with."""
    folder.mkdir()
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", *launcher, MODULE, str(folder), *kinds]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> dict[str, Any]:
    (found,) = run(tmp_path_factory.mktemp("reducing") / "one", (*TRAINERS, *LOOP))
    return found


def hold(alone: dict[str, Any], found: list[dict[str, Any]], kinds: Sequence[str]) -> None:
    """Two processes ended where one did, with bits of their own in common."""
    assert len(found) == 2
    for kind in kinds:
        one, (left, right) = alone[kind], (part[kind] for part in found)
        assert one["traffic"] is None
        assert left["wrapped"] == ("DistributedDataParallel" if kind == "heads" else one["wrapped"])
        # The Trainer multiplies BERT's mean loss by the number of processes, which clipping takes out again.
        wanted = [2 * loss if kind == "heads" else loss for loss in one["losses"]]
        assert left["losses"] == pytest.approx(wanted, abs=1e-5), kind
        for name, value in one["values"].items():
            assert torch.equal(left["values"][name], right["values"][name]), (kind, name)
            torch.testing.assert_close(
                left["values"][name], value, rtol=0, atol=1e-4
            )  # a hundredth of Adam's step
        steps = 8 if kind in ("features", "heads") else 4 if kind == "accumulated" else 3
        assert left["traffic"]["steps"] == steps, kind
        assert left["traffic"]["calls"] == 2 * steps, kind


def test_torchrun(alone: dict[str, Any], tmp_path: Path) -> None:
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), "-m")  # fmt: skip
    hold(alone, run(tmp_path / "two", TRAINERS, *launcher), TRAINERS)


def test_accelerate_launch(alone: dict[str, Any], tmp_path: Path) -> None:
    # On a CPU accelerate starts several processes for "--multi_gpu" alone; the script says cpu=True.
    launcher = (
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port",
        free_port(), "--mixed_precision", "no", "--dynamo_backend", "no", "-m",
    )  # fmt: skip
    hold(alone, run(tmp_path / "two", LOOP, *launcher), LOOP)
