"""Several files as one version: a folder is made aside and takes the other's place in one step.

Where programs read two files or more together (PEFT's configuration and tensors, a transformers model), renaming each
leaves a mixture if the writer is killed in between. Linux and macOS can exchange two folders in one step, so the new
folder is made beside the old one, gets its other files as links, and is exchanged with it.

Some folders cannot be exchanged: a mount point, the working folder, one whose parent may not be written, or on a system
without the call. There the file by which readers tell the folder (``key``) is removed first and put last: a kill in
between leaves a folder that does not open, and never a mixture.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from flix.core.files import aside_of, fcntl, lock, make_folder, sync_folder

_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.part", re.DOTALL)


@contextmanager
def whole_folder(
    folder: Path, key: str, keep: Callable[[str], bool] = lambda name: True
) -> Iterator[Path]:
    """A new folder to write into, which takes the place of ``folder`` at the end, in one step where the system can.

    Args:
        folder: the folder; it may exist.
        key: the file without which readers do not take the folder for one of this kind.
        keep: which of the files and folders that are there, and not written anew, stay.
    """
    target = Path(os.path.realpath(folder))
    make_folder(target.parent)
    for place in (target.parent, target):
        _sweep_folders(place, target.name)
    with ExitStack() as held:
        stage = _made_aside(target, held)
        with suppress(OSError):  # none is there
            os.chmod(stage, stat.S_IMODE(target.stat().st_mode) & 0o777)
        yield stage
        _sync_tree(stage)
        with alone(target):
            if not _exchanged(stage, target, keep):
                _moved_in(stage, target, key, keep)
            sync_folder(target.parent)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Write what is several files of a folder while no other writer does; the folder is made if it is not there."""
    handle = None
    while fcntl is not None:
        make_folder(folder)
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                break
        os.close(handle)  # another took its place meanwhile
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _made_aside(target: Path, held: ExitStack) -> Path:
    """A fresh folder on the target's file system: beside it, or in it where it must stay as it is.

    It is locked, and removed again at the end, if it is still there.
    """
    while True:
        stage = aside_of(target)
        try:
            if _must_stay(target):
                raise PermissionError
            stage.mkdir()
        except PermissionError:
            make_folder(target)
            stage = target / stage.name
            stage.mkdir()
        held.callback(shutil.rmtree, stage, ignore_errors=True)
        if fcntl is None:
            return stage
        with suppress(
            FileNotFoundError
        ):  # another writer took it for a leftover: it was not locked yet
            handle = os.open(stage, os.O_RDONLY)
            held.callback(os.close, handle)
            if lock(handle):
                return stage


def _must_stay(target: Path) -> bool:
    try:
        here = Path.cwd().resolve()
    except OSError:
        return False
    return target == here or target in here.parents or os.path.ismount(target)


def _exchanged(stage: Path, target: Path, keep: Callable[[str], bool]) -> bool:
    """Put a folder in another's place in one step; False where that cannot be done."""
    if stage.parent != target.parent:
        return False
    with suppress(OSError):  # none is there, or an empty one
        if os.name != "nt" or not target.exists():
            os.rename(stage, target)
            return True
    if not target.is_dir() or (exchange := _exchange()) is None:
        return False
    _link_others(target, stage, keep)
    sync_folder(stage)
    return exchange(os.fsencode(stage), os.fsencode(target)) == 0


def _exchange() -> Callable[[bytes, bytes], int] | None:
    """The system's call that exchanges two paths; None if it has none."""
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            swap = library.renamex_np
            return lambda one, other: int(swap(one, other, ctypes.c_uint(2)))  # RENAME_SWAP
        rename, here = library.renameat2, -100  # AT_FDCWD
        return lambda one, other: int(rename(here, one, here, other, ctypes.c_uint(2)))
    return None


def _link_others(source: Path, into: Path, keep: Callable[[str], bool]) -> None:
    """Give a folder what else another holds: links to the same files."""
    for entry in os.scandir(source):
        if os.path.lexists(into / entry.name) or not keep(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, into / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry.path, str(into / entry.name))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _moved_in(stage: Path, target: Path, key: str, keep: Callable[[str], bool]) -> None:
    """Move files into a folder one by one; the key is gone before the first and there after the last."""
    make_folder(target)
    with suppress(FileNotFoundError):
        os.unlink(target / key)
    sync_folder(target)
    names = sorted(os.listdir(stage), key=lambda name: name == key)
    for name in os.listdir(target):
        if name not in names and not keep(name) and target / name != stage:
            _remove(target / name)
    for name in names:
        if (target / name).is_dir():
            _remove(target / name)
        if name == key:
            sync_folder(target)
        os.replace(stage / name, target / name)
    sync_folder(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_tree(folder: Path) -> None:
    if os.name == "nt":  # syncs what is open for writing alone
        return
    for place, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(place, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(place))


def _sweep_folders(parent: Path, name: str) -> None:
    """Remove what killed writers of this folder left beside it; what a living writer holds stays."""
    with suppress(OSError), os.scandir(parent) as entries:
        found = [
            entry.path
            for entry in entries
            if (m := _ASIDE.fullmatch(entry.name)) and m["name"] == name and entry.is_dir()
        ]
        for path in found:
            with suppress(OSError):
                handle = os.open(path, os.O_RDONLY)
                try:
                    if fcntl is not None:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(handle)
