"""The cache of built data: a folder of JSON lines for each build version, seed and set of packages."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flix.core.folders import whole_folder

from .design import BUILD_VERSION
from .types import Cell, Example

PACKAGES = ("simplemma", "wordfreq", "pyphen", "num2words", "babel")
SPLITS = ("train", "dev", "test")
INDEX = "index.json"


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


def cache_folder(folder: Path, seed: int) -> Path:
    """Where the data of a seed is kept."""
    key = json.dumps([BUILD_VERSION, seed, package_versions()], sort_keys=True)
    return folder / f"quickstart-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def file_of(folder: Path, task: str, language: str, split: str) -> Path:
    """The file of one split of a cell: JSON lines with ``source`` and ``target``."""
    return folder / task / f"{language}.{split}.jsonl"


def read_cells(folder: Path) -> list[Cell] | None:
    """The cells of a folder; None where there is none or it is not whole."""
    try:
        return [_read(folder, **row) for row in json.loads((folder / INDEX).read_bytes())["cells"]]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _read(folder: Path, rows: dict[str, int], **row: Any) -> Cell:
    parts: dict[str, Any] = {split: [] for split in SPLITS}
    for split, count in rows.items():
        lines = file_of(folder, row["task"], row["language"], split).read_bytes().splitlines()
        parts[split] = [Example(**json.loads(line)) for line in lines]
        if len(parts[split]) != count:
            raise ValueError("rows are missing")
    return Cell(**row, **parts)


def write_cells(folder: Path, cells: list[Cell]) -> None:
    """Write a folder: whole, or not at all. A split without rows has no file."""
    index = []
    with whole_folder(folder, INDEX, keep=lambda name: False) as aside:
        for cell in cells:
            row = {key: value for key, value in asdict(cell).items() if key not in SPLITS}
            index.append({**row, "rows": _write(aside, cell)})
        said = {"build": BUILD_VERSION, "packages": package_versions(), "cells": index}
        (aside / INDEX).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _write(folder: Path, cell: Cell) -> dict[str, int]:
    """The files of a cell; returns how many rows each split has."""
    rows = {}
    for split in SPLITS:
        if examples := getattr(cell, split):
            rows[split] = len(examples)
            file = file_of(folder, cell.task, cell.language, split)
            file.parent.mkdir(exist_ok=True)
            lines = [json.dumps(asdict(example), ensure_ascii=False) for example in examples]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows
