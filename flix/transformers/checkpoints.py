"""The checkpoints of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

PREFIX = "checkpoint-"


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The latest complete checkpoint in a Trainer's output folder, or None.

    The Trainer writes ``trainer_state.json`` last. A run that was killed while it wrote a checkpoint leaves one
    without it, or with a part of it, which is passed over.
    """
    complete = [
        path
        for path in Path(output_dir).glob(f"{PREFIX}*")
        if path.name.removeprefix(PREFIX).isdigit() and _is_complete(path)
    ]
    return max(complete, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix(PREFIX))


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
