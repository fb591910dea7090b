"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial

import pytest

from flix.core import files
from flix.core.files import make_folder, sweep, sync_folder, write_file
from tests.helpers.beside import writing
from tests.helpers.stops import leftovers, stops


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_are_replaced_and_nothing_is_left_beside_them(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    write_file(tmp_path / "a", b"new")
    write_file(tmp_path / "b", lambda file: file.write(b"1"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"new", "b": b"1"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_get_what_the_umask_leaves_and_others_keep_their_permissions(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a", b"new")
        assert mode(tmp_path / "a") == 0o666 & ~umask
        for kept in (0o600, 0o640, 0o444):
            (tmp_path / "a").chmod(kept)
            write_file(tmp_path / "a", b"newer")
            assert mode(tmp_path / "a") == kept and (tmp_path / "a").read_bytes() == b"newer"
        make_folder(tmp_path / "x" / "y")
        assert mode(tmp_path / "x" / "y") == 0o777 & ~umask
    finally:
        os.umask(before)


@pytest.mark.parametrize("tidy", [True, False])
def test_a_write_that_is_stopped_anywhere_leaves_one_version(tmp_path, tidy):
    path = tmp_path / "a"
    seen = []
    for stopped in stops(lambda: write_file(path, b"new"), tidy):
        seen.append((stopped, path.read_bytes() if path.exists() else b"old"))
        assert seen[-1][1] in (b"old", b"new")
        assert len(leftovers(tmp_path)) <= (0 if tidy else 1)
        path.write_bytes(b"old")
    assert seen[-1] == (None, b"new") and {"replace", "fsync", "open"} <= {at for at, _ in seen}
    assert leftovers(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_file(tmp_path / "a", b"old")

    def full(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_file(tmp_path / "a", b"new")
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "a", lambda file: 1 / 0)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old"}


def test_what_killed_writers_left_goes_and_what_living_ones_write_stays(tmp_path):
    for name in (".a.0123456789ab.part", ".b.0123456789ab.part", ".a.original", ".a.20261128", ".a.txt"):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
    during = []

    def content(file):
        write_file(tmp_path / "a", b"another's")  # a second writer meanwhile, which sweeps
        during.extend(leftovers(tmp_path))
        file.write(b"mine")

    write_file(tmp_path / "a", content)
    assert len(during) == 2  # b's, and the first writer's own
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert names(tmp_path) == {"a", ".b.0123456789ab.part", ".a.original", ".a.20261128", ".a.txt"}
    sweep(tmp_path / "nowhere", "a")


def test_a_link_is_replaced_and_not_what_it_points_at(tmp_path):
    (tmp_path / "blob").write_bytes(b"old")
    (tmp_path / "a").symlink_to(tmp_path / "blob")
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "blob").read_bytes() == b"old" and not (tmp_path / "a").is_symlink()


def test_two_writers_and_a_reader(tmp_path):
    path = tmp_path / "a"
    versions = [bytes([i]) * 300_000 for i in range(2)]
    write_file(path, versions[0])

    with writing(*(partial(write_file, path, version) for version in versions)):
        seen = {path.read_bytes() for _ in range(400)}
    assert seen <= set(versions) and names(tmp_path) == {"a"}


def test_without_locks_files_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    (tmp_path / ".a.0123456789ab.part").write_bytes(b"")
    write_file(tmp_path / "a", b"new")
    assert names(tmp_path) == {"a"}


def test_new_folders_are_synced_into_those_above(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    make_folder(tmp_path / "x" / "y")
    make_folder(tmp_path / "x" / "y")
    assert synced == [tmp_path / "x", tmp_path]


def test_a_folder_that_cannot_be_synced_is_passed_over_and_a_failing_disk_is_not(
    tmp_path, monkeypatch
):
    sync_folder(tmp_path / "nowhere")
    real = os.fsync

    def failing(number):
        def fsync(handle):
            raise OSError(number, os.strerror(number))

        return fsync

    for number in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems without it
        monkeypatch.setattr(os, "fsync", failing(number))
        sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", real)


def test_a_file_that_another_writer_sweeps_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    real, taken = files.lock, []

    def lock(handle):
        if not taken:
            taken.append(handle)
            sweep(tmp_path, "a")
        return real(handle)

    monkeypatch.setattr(files, "lock", lock)
    write_file(tmp_path / "a", b"new")
    assert len(taken) == 1 and names(tmp_path) == {"a"} and (tmp_path / "a").read_bytes() == b"new"
