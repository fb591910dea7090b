"""Folders of several files are one version."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from flix.core import files, folders
from flix.core.folders import alone, whole_folder
from tests.helpers.stops import leftovers, stops


def write(folder: Path, version: str, **options) -> None:
    with whole_folder(folder, "key", **options) as aside:
        for name in ("a", "b", "key"):
            (aside / name).write_text(version)


def read(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in ("a", "b", "key")}


@pytest.mark.parametrize("tidy", [True, False])
@pytest.mark.parametrize("there", ["nothing", "an empty folder", "another version"])
def test_a_write_that_is_stopped_anywhere_leaves_one_version(tmp_path, there, tidy):
    folder = tmp_path / "x"

    def start():
        if folder.exists():
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
        if there != "nothing":
            folder.mkdir()
        if there == "another version":
            write(folder, "old")
            (folder / "mine").write_text("kept")

    start()
    seen = set()
    for stopped in stops(lambda: write(folder, "new"), tidy):
        seen.add(stopped)
        if there == "another version":
            assert read(folder) in ({"old"}, {"new"}), stopped
            assert (folder / "mine").read_text() == "kept"
        elif folder.exists() and os.listdir(folder):
            assert read(folder) == {"new"}
        assert len(leftovers(folder)) <= 1
        if stopped is None:
            assert read(folder) == {"new"} and leftovers(folder) == []
        else:
            start()
    assert ("exchange" in seen) == (there == "another version")


@pytest.mark.parametrize("tidy", [True, False])
def test_where_folders_cannot_be_exchanged_no_mixture_opens(tmp_path, tidy, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda: None)
    write(tmp_path / "x", "old")
    (tmp_path / "x" / "mine").write_text("kept")
    opened = set()
    for stopped in stops(lambda: write(tmp_path / "x", "new"), tidy):
        if (tmp_path / "x" / "key").exists():
            (version,) = read(tmp_path / "x")
            opened.add(version)
        assert (tmp_path / "x" / "mine").read_text() == "kept"
        if stopped is not None:
            monkeypatch.undo()
            write(tmp_path / "x", "old")
            monkeypatch.setattr(folders, "_exchange", lambda: None)
    assert opened == {"old", "new"} and leftovers(tmp_path / "x") == []


def test_the_working_folder_is_written_in_place(tmp_path, monkeypatch):
    for here in (tmp_path / "x", tmp_path / "x" / "inner"):
        here.mkdir(parents=True)
        monkeypatch.chdir(here)
        inode = (tmp_path / "x").stat().st_ino
        write(tmp_path / "x", "old")
        write(tmp_path / "x", "new")
        assert read(tmp_path / "x") == {"new"} and (tmp_path / "x").stat().st_ino == inode
        assert Path.cwd() == here
    assert {p.name for p in tmp_path.iterdir()} == {"x"}
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"a", "b", "key", "inner"}


def test_other_files_stay_as_they_are(tmp_path):
    write(tmp_path / "x", "old")
    for name in ("mine", "gone"):
        (tmp_path / "x" / name).write_text(name)
    (tmp_path / "x" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "x" / "deep" / "er" / "file").write_text("kept")
    (tmp_path / "x" / "link").symlink_to("nowhere")
    (tmp_path / "x").chmod(0o750)
    inode = (tmp_path / "x" / "mine").stat().st_ino
    write(tmp_path / "x", "new", keep=lambda name: name != "gone")
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"a", "b", "key", "mine", "deep", "link"}
    assert (tmp_path / "x" / "mine").stat().st_ino == inode
    assert (tmp_path / "x" / "deep" / "er" / "file").read_text() == "kept"
    assert os.readlink(tmp_path / "x" / "link") == "nowhere"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o750


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "x").symlink_to("real")
    write(tmp_path / "x", "old")
    write(tmp_path / "x", "new")
    assert (tmp_path / "x").is_symlink() and read(tmp_path / "real") == {"new"}


def test_a_block_that_fails_changes_nothing(tmp_path):
    write(tmp_path / "x", "old")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "x", "key") as aside:
        (aside / "a").write_text("new")
        1 / 0  # noqa: B018
    assert read(tmp_path / "x") == {"old"} and leftovers(tmp_path / "x") == []


def test_a_folder_that_another_writer_sweeps_before_it_is_locked_is_made_anew(
    tmp_path, monkeypatch
):
    taken = []

    def lock(handle):
        if len(taken) < 2:  # once before it is open, once before it is locked
            taken.append(handle)
            folders._sweep_folders(tmp_path, "x")
        return real(handle)

    def opened(path, *args, **kwargs):
        if str(path).endswith(".part") and not swept:
            swept.append(path)
            folders._sweep_folders(tmp_path, "x")
        return really_open(path, *args, **kwargs)

    swept, real, really_open = [], folders.lock, os.open
    monkeypatch.setattr(folders, "lock", lock)
    monkeypatch.setattr(os, "open", opened)
    write(tmp_path / "x", "new")
    monkeypatch.undo()
    assert read(tmp_path / "x") == {"new"} and leftovers(tmp_path / "x") == [] and len(taken) == 2


def test_writers_at_once_leave_one_version(tmp_path):
    write(tmp_path / "x", "0")
    broken = []

    def write_many(version):
        try:
            for _ in range(30):
                write(tmp_path / "x", version)
        except Exception as error:
            broken.append(error)

    threads = [threading.Thread(target=write_many, args=(v,)) for v in ("1", "2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert broken == []
    assert len(read(tmp_path / "x")) == 1 and leftovers(tmp_path / "x") == []


def test_writers_of_files_in_a_folder_take_turns(tmp_path):
    order = []

    def write_in_turn(name):
        for _ in range(50):
            with alone(tmp_path / "x"):
                order.append(name)
                time.sleep(0.0002)  # whoever is let in, comes in now
                order.append(name)

    threads = [threading.Thread(target=write_in_turn, args=(n,)) for n in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == two for one, two in zip(order[::2], order[1::2], strict=True))


@pytest.mark.parametrize("exchange", [True, False])
def test_where_there_are_no_locks_folders_are_written_all_the_same(tmp_path, exchange, monkeypatch):
    for module in (files, folders):
        monkeypatch.setattr(module, "fcntl", None)
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda: None)
    (tmp_path / ".x.0123456789ab.part").mkdir()
    for version in ("old", "new"):
        write(tmp_path / "x", version)
        assert read(tmp_path / "x") == {version} and leftovers(tmp_path / "x") == []
    with alone(tmp_path / "y"):
        pass
    assert not (tmp_path / "y").exists()  # it is made to be locked


def test_what_is_moved_into_a_folder_replaces_files_folders_and_links(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda: None)
    target = tmp_path / "x"
    for name in ("a", "gone"):
        (target / name / "deep").mkdir(parents=True)
    (target / "b").symlink_to("nowhere")
    (target / "link").symlink_to(tmp_path)
    (target / "file").write_text("gone")
    (target / "mine").write_text("kept")
    write(target, "new", keep=lambda name: name == "mine")
    assert read(target) == {"new"} and (target / "mine").read_text() == "kept"
    assert {path.name for path in target.iterdir()} == {"a", "b", "key", "mine"}
    assert not (target / "b").is_symlink() and tmp_path.is_dir()


def test_where_files_cannot_be_linked_they_are_copied(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError("no links here")

    write(tmp_path / "x", "old")
    (tmp_path / "x" / "mine").write_text("kept")
    (tmp_path / "x" / "link").symlink_to("nowhere")
    monkeypatch.setattr(os, "link", refused)
    write(tmp_path / "x", "new")
    assert read(tmp_path / "x") == {"new"} and (tmp_path / "x" / "mine").read_text() == "kept"
    assert os.readlink(tmp_path / "x" / "link") == "nowhere"


def test_a_system_without_the_call_exchanges_nothing(monkeypatch):
    def missing(*_, **__):
        raise OSError("no such library")

    monkeypatch.setattr(folders.ctypes, "CDLL", missing)
    assert folders._exchange() is None


def test_a_working_folder_that_is_gone_is_no_hindrance(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    write(tmp_path / "x", "new")
    assert read(tmp_path / "x") == {"new"}
