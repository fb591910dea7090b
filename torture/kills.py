"""Processes that are killed in the middle of saving, and readers beside two writers."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from torture.savers import SAVERS, Saver

_MESSAGE = struct.Struct("<ci")
_PATIENCE = 120.0
"""Seconds until a writer must have saved its first version: it loads a framework, and compiles."""


class Writer(NamedTuple):
    """A process that saves one version after another.

    Attributes:
        process: its number.
        pipe: where it says which version it begins and which it has done.
    """

    process: int
    pipe: int

    def said(self) -> list[tuple[bytes, int]]:
        """What it has said since the last time; its pipe is empty afterwards."""
        found = b""
        while True:
            try:
                part = os.read(self.pipe, 65536)
            except BlockingIOError:
                break
            if not part:
                break
            found += part
        whole = len(found) // _MESSAGE.size * _MESSAGE.size
        return list(_MESSAGE.iter_unpack(found[:whole]))


def start(saver: Saver, folder: Path, first: int, step: int = 1) -> Writer:
    """A process that saves the versions ``first``, ``first + step``, ... until it is killed."""
    for name in saver.imports:
        importlib.import_module(name)
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        os.close(write)
        os.set_blocking(read, False)
        return Writer(process, read)
    try:
        os.close(read)  # with its reader gone, a write ends the process
        save, version = saver.make(), first
        while True:
            os.write(write, _MESSAGE.pack(b"b", version))
            save(folder, version)
            os.write(write, _MESSAGE.pack(b"d", version))
            version += step
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def await_version(writer: Writer) -> list[tuple[bytes, int]]:
    """Wait until a writer has saved something.

    Raises:
        RuntimeError: it ended, or took too long.
    """
    said: list[tuple[bytes, int]] = []
    until = time.monotonic() + _PATIENCE
    while not any(kind == b"d" for kind, _ in said):
        if time.monotonic() > until or os.waitpid(writer.process, os.WNOHANG)[0]:
            raise RuntimeError("a writer saved nothing")
        time.sleep(0.002)
        said += writer.said()
    return said


def kill(writer: Writer) -> None:
    """End a process, as a machine's failure would."""
    os.kill(writer.process, signal.SIGKILL)
    os.waitpid(writer.process, 0)


def files(folder: Path) -> set[str]:
    """All files of a folder, and what is made for it beside it: a folder that was to take its place is one."""
    beside = (p for p in folder.parent.iterdir() if p != folder and p.name.startswith("."))
    return {str(p.relative_to(folder.parent)) for p in (folder, *folder.rglob("*"), *beside)}


def kills(saver: Saver, count: int, seed: int) -> dict[str, Any]:
    """Kill a writer so many times, each at a random moment of a save, and read what is there.

    Returns:
        ``count``; ``whole``: how often one version was found, no older than the last that was saved; ``wrong``: what
        was found else; ``left``: the most files that were left, where that was looked at.
    """
    draw = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    folder, version, whole, left = root / "adapter", 1, 0, 0
    wrong: Counter[str] = Counter()
    usual: set[str] | None = None
    for _ in range(count):
        writer = start(saver, folder, version)
        said = await_version(writer)
        begun = time.monotonic()
        first = next(version for kind, version in said if kind == b"d")
        while not (more := writer.said()) and time.monotonic() < begun + _PATIENCE:
            time.sleep(0.0005)
        said += more
        took = max(0.002, time.monotonic() - begun)
        time.sleep(draw.uniform(0, 3 * took))
        kill(writer)
        said += writer.said()
        os.close(writer.pipe)
        done = max((n for kind, n in said if kind == b"d"), default=first)
        began = max(n for kind, n in said if kind == b"b")
        version = began + 1
        try:
            found = saver.read(folder)
            if done <= found <= began:
                whole += 1
            else:
                wrong[f"version {found} where {done} to {began} were saved"] += 1
        except Exception as error:
            wrong[_said(error, root)] += 1
        if saver.name != "checkpoints":  # each is a folder of its own
            now = files(folder)
            usual = now if usual is None or len(now) < len(usual) else usual
            left = max(left, len(now - usual))
    shutil.rmtree(root)
    counted = {"count": count, "whole": whole, "wrong": dict(wrong)}
    return counted if usual is None else {**counted, "left": left}


def _said(error: Exception, root: Path) -> str:
    return f"{type(error).__name__}: {str(error).replace(str(root), '')[:120]}"


def readers(saver: Saver, seconds: float) -> dict[str, Any]:
    """Two writers of one folder, and a reader beside them.

    Returns:
        ``reads``, ``whole``, and ``wrong``: what was found where it was not one version.
    """
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    folder = root / "adapter"
    writers = [start(saver, folder, 1, 2), start(saver, folder, 2, 2)]
    try:
        for writer in writers:
            await_version(writer)
        reads, wrong, until = 0, Counter[str](), time.monotonic() + seconds
        while time.monotonic() < until:
            reads += 1
            try:
                saver.read(folder)
            except Exception as error:
                wrong[_said(error, root)] += 1
            for writer in writers:
                writer.said()
    finally:
        for writer in writers:
            kill(writer)
            os.close(writer.pipe)
    shutil.rmtree(root)
    return {"reads": reads, "whole": reads - sum(wrong.values()), "wrong": dict(wrong)}


READ_BESIDE = ("numpy", "torch, with heads", "JAX", "Keras", "PEFT export")


def run(count: int, seconds: float, only: list[str], seed: int = 0) -> list[dict[str, Any]]:
    """Kills of every saver, ``count`` together, and readers beside writers, so many seconds each.

    Every saver runs in a process of its own: some frameworks do not bear each other there.
    """
    names = [name for name in SAVERS if not only or name in only]
    found = []
    for i, name in enumerate(names):
        each = count // len(names) + (i < count % len(names))
        found.append(_apart("kills", name, each, seed + i))
    found += [_apart("readers", name, seconds, seed) for name in names if name in READ_BESIDE]
    return found


def _apart(what: str, name: str, amount: float, seed: int) -> dict[str, Any]:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        words = [what, name, str(amount), str(seed), str(out)]
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", "torture.kills", *words])
        made: dict[str, Any] = {"wrong": {f"the process ended with {done.returncode}": 1}}
        if out.exists():
            made = json.loads(out.read_text(encoding="utf-8"))
    made |= {"what": name, "seconds": round(time.monotonic() - begun, 1)}
    print(f"{what}: {made}", flush=True)
    return made


def main() -> None:
    """What :func:`_apart` runs."""
    what, name, amount, seed, out = sys.argv[1:]
    if what == "kills":
        made = kills(SAVERS[name], int(amount), int(seed))
    else:
        made = readers(SAVERS[name], float(amount))
    Path(out).write_text(json.dumps(made), encoding="utf-8")


if __name__ == "__main__":
    main()
