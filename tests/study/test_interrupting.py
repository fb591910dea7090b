"""Ctrl-C: each run saves a checkpoint, and the same command goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.study.test_run import models, one_thread, open_by_any, toys, until
from tests.study.toys import write_study

__all__ = ["models", "one_thread", "toys"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups")


def hearing():
    """Hear Ctrl-C even if this process was started in a shell's background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("whole_group", [False, True], ids=["the first process alone", "all, as a terminal does"])  # fmt: skip
def test_an_interrupted_study_saves_its_steps(tmp_path, toys, whole_group):
    # No checkpoint is due before the last step: what there is after Ctrl-C was saved because of it.
    common = [str(toys / "last_word.yaml"), {"training": {"steps": 200, "save_every": 200, "log_every": 1}}]  # fmt: skip
    path = write_study(tmp_path, toys, common=common, arms={"flix": {}}, choosing=None, seeds=1)
    command = [sys.executable, "-m", "flix.cli", "study", str(path), "--parallel", "1"]
    run = tmp_path / "study" / "runs" / "flix-0"
    with open(tmp_path / "said", "w", encoding="utf-8") as said:
        began = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True, preexec_fn=hearing)  # fmt: skip
        until(lambda: (run / "log.jsonl").is_file() and len((run / "log.jsonl").read_bytes().splitlines()) > 3, began, tmp_path)  # fmt: skip
        (os.killpg if whole_group else os.kill)(began.pid, signal.SIGINT)
        assert began.wait(timeout=90) != 0
    assert "the same command goes on from here" in (tmp_path / "said").read_text()
    assert not open_by_any(run.with_name("flix-0.log"))
    saved = [int(p.name.rpartition("-")[2]) for p in (run / "checkpoints").glob("checkpoint-*")]
    assert saved and 3 <= max(saved) < 200
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line).get("step") for line in (run / "log.jsonl").read_text().splitlines()]
    assert sorted({s for s in steps if s}) == [*range(1, 201)]
