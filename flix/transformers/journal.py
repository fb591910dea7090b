"""What a run logs, as lines of JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flix.core.files import write_file


class Journal:
    """``log.jsonl``: a line for what is logged, a line for each evaluation; every step once, resumed or not.

    Args:
        file: the file; None writes nothing.
        step: lines of later steps go: the run is continued from here.
        seconds: how long it had trained by then, if that is known.
    """

    def __init__(self, file: Path | None, step: int = 0, seconds: float = 0.0) -> None:
        self.file = file
        self.entries = [e for e in _read_lines(file) if e.get("step", 0) <= step] if file and step else []  # fmt: skip
        self.before = max([seconds, *(float(e.get("seconds", 0.0)) for e in self.entries)])
        self.began: float | None = None

    def start(self) -> None:
        """Training begins: the file holds what was logged before."""
        self.began = time.perf_counter()
        if self.file is not None:
            write_file(self.file, "".join(map(line_of, self.entries)).encode("utf-8"))

    @property
    def seconds(self) -> float:
        """How long the run has trained, before it was continued too."""
        since = 0.0 if self.began is None else time.perf_counter() - self.began
        return round(self.before + since, 3)

    def logged(self, step: int, values: Mapping[str, Any]) -> None:
        """What the Trainer logged at a step."""
        self._add({"step": step, "seconds": self.seconds, **values})

    def evaluated(self, step: int, found: Mapping[str, Any]) -> None:
        """What an evaluation found."""
        self.entries = [e for e in self.entries if e["step"] != step or "evaluation" not in e]
        self._add({"step": step, "seconds": self.seconds, "evaluation": dict(found)})

    def _add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as log:
                log.write(line_of(entry))

    def history(self) -> dict[str, Any]:
        """The losses for ``metrics.json``."""
        losses = [{"step": e["step"], "loss": e["loss"]} for e in self.entries if "loss" in e]
        evaluations = [
            {"step": e["step"], **{k: e["evaluation"][k] for k in ("loss", "seen", "held_out")}}
            for e in self.entries
            if "evaluation" in e
        ]
        return {"losses": losses, "evaluation_losses": evaluations}


def _read_lines(file: Path | None) -> list[dict[str, Any]]:
    found = []
    try:
        for line in (file or Path()).read_text(encoding="utf-8").splitlines():
            found.append(json.loads(line))
    except (OSError, ValueError):
        pass  # a line that a killed run left half written is the last
    return [entry for entry in found if isinstance(entry, dict)]


def plain(data: Any) -> Any:
    """Data as JSON has it: a number that is none is null."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    return [plain(value) for value in data] if isinstance(data, list | tuple) else data


def line_of(entry: Any) -> str:
    """A line of JSONL."""
    return json.dumps(plain(entry), ensure_ascii=False, allow_nan=False) + "\n"
