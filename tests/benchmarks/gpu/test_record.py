"""A section's findings survive errors, and what there is no time for is said."""

import json

import numpy as np

from benchmarks.common import Figure, Table
from benchmarks.gpu.record import Record


def test_errors_are_written_down_and_the_section_goes_on(tmp_path, capsys):
    path = tmp_path / "section.json"
    record = Record(path, 60.0)

    def broken():
        raise ValueError("the kernel is wrong")

    assert record.attempt("first", broken) is None
    assert record.attempt("second", lambda: 7) == 7
    record.put("figure", np.float32(1.5))
    record.table(Table("A table", ["", "ms"], [["fused", Figure(1.0, 0.9, 1.1)]]))
    found = json.loads(path.read_text())
    assert "ValueError: the kernel is wrong" in found["errors"]["first"]
    assert found["figures"]["figure"] == 1.5
    assert found["tables"][0]["rows"][0][1] == {"median": 1.0, "low": 0.9, "high": 1.1}
    assert found["skipped"] == {}
    assert "the kernel is wrong" in capsys.readouterr().out


def test_what_is_not_installed_is_skipped_with_a_line(tmp_path, capsys):
    record = Record(tmp_path / "section.json", 60.0)
    assert record.attempt("a peer", lambda: __import__("no_such_peer")) is None
    assert record.data["errors"] == {}
    assert record.data["skipped"] == {"a peer": "No module named 'no_such_peer'"}
    assert "a peer: skipped, No module" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_skipped(tmp_path):
    record = Record(tmp_path / "section.json", 3.0)
    assert record.attempt("long", lambda: 7, needs=60.0) is None
    assert record.attempt("short", lambda: 7, needs=0.5) == 7
    assert json.loads(record.path.read_text())["skipped"] == {"long": "no time was left"}
