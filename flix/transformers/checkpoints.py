"""The checkpoints of a run, and which of them are complete.

A Trainer writes a checkpoint file by file. So :data:`MANIFEST` is written last, and names all the files that are there
with their digests; it is removed before the first of them is written over. A checkpoint whose files are those that it
names is one run's at one step, whatever was killed, copied or written over in between.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from flix.core.adapter.files import TENSOR_FILE
from flix.core.errors import AdapterError, shown
from flix.core.files import sync_folder, write_file
from flix.core.strictjson import parsed

PREFIX = "checkpoint-"
MANIFEST = "flix_checkpoint.json"
STATE = "trainer_state.json"


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The latest complete checkpoint in a Trainer's output folder, or None.

    A checkpoint that a killed run left half written, or that another run half overwrote, is skipped.
    """
    return next((p for p in checkpoints_of(output_dir) if incomplete(p) is None), None)


def checkpoints_of(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a Trainer's output folder, the latest first, complete or not."""
    found = [
        path
        for path in Path(output_dir).glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdigit()
    ]
    return sorted(found, key=checkpoint_step, reverse=True)


def none_complete(output_dir: str | os.PathLike[str], shown_as: str | None = None) -> str:
    """What to say where :func:`last_checkpoint` finds none: what is wrong with each that is there.

    Args:
        output_dir: the Trainer's output folder.
        shown_as: what to call it.
    """
    why = "".join(f"; {path.name}: {incomplete(path)}" for path in checkpoints_of(output_dir))
    return f"nothing to resume: {shown_as or str(output_dir)!r} holds no complete checkpoint{why}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix(PREFIX))


def begin(checkpoint: Path) -> None:
    """Call it before anything of a checkpoint is written: what stands under its name is no checkpoint any more."""
    files = _named(checkpoint) or {}
    # The state first: without it no checkpoint is complete, by any rule.
    for name in (STATE, MANIFEST, *files):
        (checkpoint / name).unlink(missing_ok=True)
    if files:
        sync_folder(checkpoint)


def finish(checkpoint: Path) -> None:
    """Call it after everything of a checkpoint was written: it names the files."""
    files = {
        str(path.relative_to(checkpoint).as_posix()): _described(path)
        for path in _files(checkpoint)
    }
    said = {"format": "flix checkpoint", "version": 1, "files": files}
    write_file(checkpoint / MANIFEST, (json.dumps(said, indent=1) + "\n").encode())


def incomplete(checkpoint: Path) -> str | None:
    """Why a checkpoint is not complete; None if it is.

    One that was saved before format 2 names no files; it counts as complete if the Trainer's state, which was then
    written last, can be read.
    """
    if not (checkpoint / MANIFEST).is_file():
        if _is_of_today(checkpoint / TENSOR_FILE):
            return f"it has no {MANIFEST}, which is written last"
        try:
            json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"{STATE} cannot be read ({error})"
        return None
    files = _named(checkpoint)
    if files is None:
        return f"{MANIFEST} is damaged"
    for name, said in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _described(path) != said:
            return f"{name} is another than the one that was saved"
    return None if STATE in files else f"{MANIFEST} names no {STATE}"


def _files(checkpoint: Path) -> Iterator[Path]:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path != checkpoint / MANIFEST and not path.name.endswith(".part"):
            yield path


def _described(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _named(checkpoint: Path) -> dict[str, Any] | None:
    """The files that a manifest names; None without one, or one that is damaged."""
    try:
        said = parsed((checkpoint / MANIFEST).read_bytes(), shown(str(checkpoint)))
        files = said["files"]
        inside = all(not os.path.isabs(n) and ".." not in Path(n).parts for n in files)
        return dict(files) if inside else None
    except (OSError, AdapterError, TypeError, KeyError, ValueError):
        return None


def _is_of_today(path: Path) -> bool:
    """Whether an adapter's file is of version 2, that is, of a flix that names a checkpoint's files."""
    from flix.core.adapter.stored import StoredTensors

    with suppress(OSError, ValueError), open(path, "rb", buffering=0) as file:
        return StoredTensors(file).metadata.get("version") is not None
    return path.exists()
