"""The figures as tables in docs/reliability.md, between markers; the page keeps its own words."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.report import environment_line, replace_block, write_table

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {
    "kills": (("what", "what"), ("count", "kills"), ("whole", "one whole version"), ("left", "files left, at most")),
    "readers": (("what", "what"), ("reads", "reads"), ("whole", "one whole version")),
    "fuzz": (
        ("what", "what"), ("inputs", "inputs"), ("refused", "refused"), ("accepted", "accepted, rightly"),
        ("failed", "failed"), ("slowest", "slowest, s"), ("peak", "most memory, MiB"),
    ),
    "long": (("what", "what"), ("result", "result"), ("growth", "memory, % more"), ("seconds", "s")),
}  # fmt: skip


def commit() -> str:
    """The tree's commit, with a mark where it has changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "no repository"


def tables(made: dict[str, Any]) -> str:
    """One part's tables and where they come from."""
    parts = []
    rows = made["rows"]
    kinds = (
        {"kills": "kills", "readers": "readers"}
        if made["part"] == "kills"
        else {made["part"]: made["part"]}
    )
    for kind in kinds:
        mine = [
            row
            for row in rows
            if made["part"] != "kills" or ("reads" in row) == (kind == "readers")
        ]
        if mine:
            keys, heads = zip(*COLUMNS[kind], strict=True)
            cells = [[row.get(key, "–") for key in keys] for row in mine]
            parts.append(write_table(heads, cells))
    where = environment_line(made["environment"])
    parts.append(f"*Commit {made['commit']}, {made['seconds'] / 60:.0f} minutes. {where}*")
    return "\n\n".join(parts)


def write_docs(out: Path, docs: Path) -> None:
    """Write what was measured into the page."""
    page = docs / "reliability.md"
    text = page.read_text(encoding="utf-8")
    for file in sorted(out.glob("*.json")):
        made = json.loads(file.read_text(encoding="utf-8"))
        if not file.stem.endswith("-smoke"):
            text = replace_block(text, made["part"], tables(made))
    page.write_text(text, encoding="utf-8")
