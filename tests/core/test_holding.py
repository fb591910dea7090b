"""A folder that one program works in at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flix.core.errors import RunError
from flix.core.holding import LOCK, alone_in

HOLD = "import sys, time, pathlib\nfrom flix.core.holding import alone_in\nwith alone_in(pathlib.Path(sys.argv[1]), 'x'):\n    print(1, flush=True)\n    time.sleep(60)"  # fmt: skip


def test_one_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            alone_in(tmp_path, "flix train"),
            pytest.raises(RunError, match="another flix train is working in this folder"),
            alone_in(tmp_path, "flix train"),
        ):
            pass
        assert not [*tmp_path.iterdir()]


def test_the_file_may_stay_as_a_mark(tmp_path: Path) -> None:
    for _ in range(2):
        with alone_in(tmp_path, "flix study", leave=True):
            pass
        assert [file.name for file in tmp_path.iterdir()] == [LOCK]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind there")
def test_whoever_is_killed_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as other:  # fmt: skip
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(RunError), alone_in(tmp_path, "x"):
            pass
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    with alone_in(tmp_path, "x"):
        pass
    assert not [*tmp_path.iterdir()]
