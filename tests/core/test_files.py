"""Files are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from flix.core.files import write_file, write_files


def test_files_are_replaced_and_nothing_is_left_beside_them(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    write_file(tmp_path / "a", b"new")
    write_files(tmp_path, {"b": b"1", "c": b"2"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"new", "b": b"1", "c": b"2"}  # fmt: skip
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    write_files(tmp_path, {"a": b"old", "b": b"old"})
    synced = []

    def full(handle):
        synced.append(handle)
        if len(synced) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_files(tmp_path, {"a": b"new", "b": b"new"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old", "b": b"old"}
