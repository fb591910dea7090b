"""Where commands write."""

from __future__ import annotations

import json
from pathlib import Path

from flix.training.errors import RunError


def check_out(out: Path, force: bool, *inputs: Path) -> None:
    """Refuse an output folder that would overwrite something.

    Args:
        out: the folder.
        force: whether it may hold something already.
        inputs: what the command reads.

    Raises:
        RunError: a file, a folder that is not empty, or one of the inputs.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"--out: {str(out)!r} is a file")
    if out.exists() and out.resolve() in [path.resolve() for path in inputs]:
        raise RunError(f"--out must be another folder than what is read, got {str(out)!r}")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise RunError(f"--out: {str(out)!r} is not empty; --force writes into it anyway")


def may_replace(out: Path, *keys: str, lacks: str = "") -> bool:
    """Whether a file may be overwritten with results: there is none, it is empty, or it holds such results.

    Args:
        out: the file.
        keys: the keys that such results have, as JSON.
        lacks: one that they do not have, by which others can be told.
    """
    if not out.is_file():
        return True
    text = out.read_bytes()
    if not text:
        return True
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(key in found for key in keys) and lacks not in found
