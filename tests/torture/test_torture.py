"""The torture catches what it is there for: mixtures, lost versions, leftovers, foreign errors, what never ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import flix
from torture import bounded, fuzz, kills, long
from torture.inputs import VALUES
from torture.report import COLUMNS, tables
from torture.savers import SAVERS, MixedError, Saver, one_version

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def _two_files():
    """A save of two files: a kill between them leaves a mixture."""

    def write(folder, version):
        folder.mkdir(exist_ok=True)
        for name in ("a", "b"):
            aside = folder / f"{name}.{os.getpid()}"
            aside.write_text(str(version))
            os.replace(aside, folder / name)
            time.sleep(0.005)

    return write


def _read_two_files(folder):
    return one_version([int((folder / name).read_text()) for name in ("a", "b")], "the folder")


def _late():
    """A save that ends before anything is there."""
    state = {}

    def write(folder, version):
        folder.mkdir(exist_ok=True)
        aside = folder / "a.new"
        aside.write_text(str(state.get("last", version)))
        os.replace(aside, folder / "a")
        state["last"] = version

    return write


def _littering():
    def write(folder, version):
        folder.mkdir(exist_ok=True)
        (folder / f"part-{version}").write_text("")
        aside = folder / "a.new"
        aside.write_text(str(version))
        os.replace(aside, folder / "a")

    return write


def _read_one_file(folder):
    return int((folder / "a").read_text())


@needs_fork
def test_mixtures_are_found():
    found = kills.kills(Saver("two files", _two_files, _read_two_files), 12, 0)
    assert found["whole"] < 12 and any("MixedError" in what for what in found["wrong"])
    assert kills.readers(Saver("two files", _two_files, _read_two_files), 0.5)["wrong"]


@needs_fork
def test_versions_that_were_lost_are_found():
    # On a busy machine many a writer is killed before its second save, the first that can be late.
    for seed in range(10):
        found = kills.kills(Saver("late", _late, _read_one_file), 12, seed)
        if any("where" in what for what in found["wrong"]):
            return
    raise AssertionError(f"{found['whole']} of {found['count']} were whole, ten times")


@needs_fork
def test_files_that_are_left_are_counted():
    assert kills.kills(Saver("littering", _littering, _read_one_file), 3, 0)["left"] > 1


@needs_fork
def test_a_writer_that_ends_is_an_error():
    def broken():
        raise ValueError("no disk")

    with pytest.raises(RuntimeError, match="saved nothing"):
        kills.kills(Saver("broken", broken, _read_one_file), 1, 0)


def test_versions_are_told_apart():
    assert one_version([np.full(3, 7), np.full((2, 2), 7.0)], "x") == 7
    with pytest.raises(MixedError, match=r"x holds the versions \[7.0, 8.0\]"):
        one_version([np.full(3, 7), np.array([7, 8])], "x")


@needs_fork
def test_an_adapter_is_one_version():
    found = kills.kills(SAVERS["numpy"], 3, 1)
    assert (found["whole"], found["wrong"]) == (3, {})


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("call", "counted"),
    [
        (lambda _: None, "accepted"),
        (lambda _: _raise(flix.AdapterError("no")), "refused"),
        (lambda _: _raise(KeyError("no")), "failures"),
        (lambda _: _raise(bounded.WrongError("taken")), "failures"),
        (lambda _: _raise(RecursionError()), "failures"),
    ],
)
def test_what_a_call_ends_in_is_counted(call, counted):
    tally = bounded.Tally()
    tally.call(call, "an input")
    assert tally.inputs == 1
    assert {"accepted": tally.accepted, "refused": tally.refused, "failures": sum(tally.failures.values())} == {
        **dict.fromkeys(("accepted", "refused", "failures"), 0), counted: 1
    }  # fmt: skip


def test_calls_that_do_not_end_are_stopped(monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.4)
    tally = bounded.Tally()

    def swallows(_):
        while True:
            try:
                time.sleep(1)
            except Exception:
                continue

    tally.call(swallows, 0)
    tally.call(lambda _: time.sleep(0.45), 0)
    assert list(tally.failures) == ["more than 0.8 s", "more than 0.4 s"]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_target_takes_and_refuses_inputs(name):
    """A target that refuses all, or takes all, tries nothing."""
    found = fuzz.fuzz(name, 400, 0)
    assert found["inputs"] == found["refused"] + found["accepted"] + found["failed"] >= 300
    assert found["refused"] > 10
    assert found["accepted"] > 0
    json.dumps(found)


def test_a_damaged_file_that_is_taken_is_found(monkeypatch, tmp_path):
    """Were digests not compared, the bytes of tensors could be changed."""
    target = fuzz.TARGETS["an adapter's bytes"](tmp_path)
    monkeypatch.setattr(flix, "load_adapter", lambda folder: fuzz.adapter(2))
    with pytest.raises(bounded.WrongError):
        target.call(b"")


def test_hostile_values_are_many():
    from hypothesis import find

    for what in (float, str, dict, list, bool, type(None)):
        assert type(find(VALUES, lambda value, what=what: type(value) is what)) is what


def test_long_tests_are_rows_with_what_they_recorded(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_that_memory_stays(record_property): record_property('growth', '0.25')\n"
        "def test_that_fails(): assert 0\n"
        "@pytest.mark.skip\n"
        "def test_that_is_skipped(): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", str(tmp_path / "test_it.py"), f"--junitxml={report}"]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    one, two, three = long._rows("torch", report)
    assert (one["what"], one["growth"]) == ("torch: that memory stays", "0.25")
    assert [row["result"] for row in (one, two, three)] == ["as promised", "failed", "skipped"]
    assert "wrong" in two and "wrong" not in one and long._rows("x", tmp_path / "none")[0]["wrong"]


def test_tables_show_what_was_found():
    row = {"what": "numpy", "count": 9, "whole": 9, "left": 1}
    reads = {"what": "numpy", "reads": 5, "whole": 5}
    where = {
        "date": "2026-01-01",
        "cpu": "c",
        "cores": 2,
        "threads": 1,
        "python": "3.11",
        "versions": {},
    }
    text = tables(
        {
            "part": "kills",
            "rows": [row, reads],
            "seconds": 60,
            "commit": "abc",
            "environment": where,
        }
    )
    assert "| numpy | 9 | 9 | 1 |" in text and "| numpy | 5 | 5 |" in text and "Commit abc" in text
    assert set(COLUMNS) == {"kills", "readers", "fuzz", "long"}
