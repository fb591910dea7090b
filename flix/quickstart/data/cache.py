"""The cache of built data: one JSON-lines file for each build version, seed and set of packages."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flix.core.files import write_file

from .design import BUILD_VERSION
from .types import Cell, Example

PACKAGES = ("simplemma", "wordfreq", "pyphen", "num2words", "babel")


def default_cache_dir() -> Path:
    """``$FLIX_CACHE``, or the platform's folder for a user's caches."""
    named = os.environ.get("FLIX_CACHE")
    if named:
        return Path(named).expanduser()
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA")
        return Path(root) / "flix" / "Cache" if root else Path.home() / ".flix" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flix"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "flix"


def package_versions() -> dict[str, str]:
    """Versions of the packages that the data comes from."""
    return {name: version(name) for name in PACKAGES}


def cache_file(folder: Path, seed: int) -> Path:
    """Where the data of a seed is kept."""
    key = json.dumps([BUILD_VERSION, seed, package_versions()], sort_keys=True)
    return folder / f"quickstart-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"


def _examples(rows: list[list[str]]) -> list[Example]:
    return [Example(source, target) for source, target in rows]


def read_cells(path: Path) -> list[Cell] | None:
    """The cells of a cache file; None where there is no file or it is not whole."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        header = json.loads(lines[0])
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]
        if header["cells"] != len(rows):
            return None
        return [
            Cell(**{**row, **{part: _examples(row[part]) for part in ("train", "dev", "test")}})
            for row in rows
        ]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_cells(path: Path, cells: list[Cell]) -> None:
    """Write a cache file: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"cells": len(cells), "build": BUILD_VERSION, "packages": package_versions()}
    lines = [json.dumps(header)]
    for cell in cells:
        row = asdict(cell)
        for part in ("train", "dev", "test"):
            row[part] = [[pair["source"], pair["target"]] for pair in row[part]]
        lines.append(json.dumps(row, ensure_ascii=False))
    write_file(path, ("\n".join(lines) + "\n").encode())
