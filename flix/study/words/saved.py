"""Reads the files that :func:`.write_words` wrote, and compares them with their fingerprint."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from flix.data.errors import DataError
from flix.study.words.design import BUILD_VERSION
from flix.study.words.types import SPLITS, Cell, Pair, Split, WordsData
from flix.study.words.writing import FINGERPRINT


def read_words(folder: str | Path) -> WordsData:
    """The data in a folder that :func:`.write_words` wrote. It equals what was written, but ``trained`` is empty.

    Raises:
        DataError: no such folder, an unfinished one, or one of another version; a file that is missing or was changed.
    """
    folder = Path(folder)
    said = _fingerprint(folder)
    files = said["files"]
    cells = []
    for cell in said["cells"]:
        pairs: dict[Split, tuple[Pair, ...]] = dict.fromkeys(SPLITS, ())
        for split in SPLITS:
            if cell[split]:
                name = f"{cell['cell']}.{split}.jsonl.gz"
                pairs[split] = _pairs(folder / name, files[name]["sha256"])
        cells.append(
            Cell(
                cell["language"], cell["task"], pairs["train"], pairs["dev"], pairs["test"], cell["held_out"],
                cell["low_resource"],
            )
        )  # fmt: skip
    return WordsData(
        tuple(cells), said["families"], said["branches"], said["seed"], fingerprint=said
    )


def _fingerprint(folder: Path) -> dict[str, Any]:
    path = folder / FINGERPRINT
    try:
        said: dict[str, Any] = json.loads(path.read_bytes())
        version = said["build"]
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); the study's data is written by "
            "python -m flix.study.words, this file at its end"
        ) from None
    except (ValueError, LookupError, TypeError):
        raise DataError(f"{path}: no fingerprint of the study's data") from None
    if version != BUILD_VERSION:
        raise DataError(
            f"{path}: written by build {version}, this is build {BUILD_VERSION}; write the data anew"
        )
    return said


def _pairs(path: Path, digest: str) -> tuple[Pair, ...]:
    try:
        text = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if hashlib.sha256(text).hexdigest() != digest:
        raise DataError(f"{path}: not as it was written: its SHA-256 is not the fingerprint's")
    rows = [json.loads(line) for line in text.decode().split("\n")[:-1]]
    return tuple(Pair(row["source"], row["target"]) for row in rows)
