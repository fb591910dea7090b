"""The data as files: rows by task and language, a fingerprint, and two configurations of ``flix train``."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flix.core.files import make_folder, write_file
from flix.data.errors import DataError
from flix.study.words.loading import OFFICIAL, official_languages, official_rows
from flix.study.words.types import SPLITS, WordsData

FINGERPRINT = "fingerprint.json"
CHOOSING, LAST_WORD = "choosing.yaml", "last_word.yaml"


def write_words(
    data: WordsData,
    out: str | Path,
    *,
    folder: str | Path | None = None,
    model: str = "google/byt5-small",
    branches: bool = False,
) -> Path:
    """Write the data into a new or empty folder.

    ``TASK/LANGUAGE.train.jsonl.gz``, ``.dev`` and ``.test`` contain the rows that :meth:`.WordsData.rows` gives.
    Held-out cells have only ``.dev`` or only ``.test``. ``official/TASK/LANGUAGE.test.jsonl.gz`` contains the shared
    tasks' test sets. ``choosing.yaml`` evaluates on rows that are for choices, and ``last_word.yaml`` on the others.
    ``fingerprint.json`` describes sources and files. The same data always gives the same bytes.

    Args:
        data: what to write.
        out: the folder.
        folder: contains the clones, for the official test sets; None leaves these out.
        model: the base model of the configurations.
        branches: also give features to language families in the configurations.

    Returns:
        The path of ``choosing.yaml``.

    Raises:
        DataError: the folder is not empty; rows of another data set would be read with these.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{str(out)!r} is there and not an empty folder; name a new one")
    written: dict[str, dict[str, Any]] = {}

    def put(name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "".join(f"{line}\n" for line in lines).encode()
        make_folder((out / name).parent)
        write_file(out / name, _packed(text))
        written[name] = {"rows": len(lines), "sha256": hashlib.sha256(text).hexdigest()}

    for cell in data.cells:
        for split in SPLITS:
            rows = [data.row(cell.language, cell.task, pair) for pair in cell.pairs(split)]
            if rows:
                put(f"{cell.name}.{split}.jsonl.gz", rows)
    for task in OFFICIAL if folder is not None else ():
        for language in official_languages(folder, data, task):  # type: ignore[arg-type]
            put(f"official/{task}/{language}.test.jsonl.gz", official_rows(folder, data, task, language))  # type: ignore[arg-type]  # fmt: skip
    cells = [
        {
            "cell": cell.name,
            "language": cell.language,
            "task": cell.task,
            "held_out": cell.held_out,
            "low_resource": cell.low_resource,
            **{split: len(cell.pairs(split)) for split in SPLITS},
        }
        for cell in data.cells
    ]
    fingerprint = {
        **data.fingerprint,
        "families": data.families,
        "branches": data.branches,
        "cells": cells,
        "files": written,
    }
    text = json.dumps(fingerprint, ensure_ascii=False, indent=1) + "\n"
    write_file(out / FINGERPRINT, text.encode())
    for name, split in ((LAST_WORD, "test"), (CHOOSING, "dev")):
        text = configuration(data, split, model=model, branches=branches)
        write_file(out / name, text.encode())
    return out / CHOOSING


def _packed(text: bytes) -> bytes:
    """gzip without a name or a time in it, so that the same text gives the same bytes."""
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        file.write(text)
    return packed.getvalue()


def configuration(
    data: WordsData, split: str, *, model: str = "google/byt5-small", branches: bool = False
) -> str:
    """A configuration of ``flix train`` that lies beside the files and evaluates on ``dev`` or on ``test``.

    Args:
        data: what the files contain.
        split: ``"dev"`` evaluates trained cells and the held-out cells that are for choices; ``"test"`` evaluates
            trained cells and the held-out cells for the last word.
        model: the base model.
        branches: also give features to language families.
    """
    half = {"dev": "tuning", "test": "test"}[split]
    said = (
        "what choices may be made by" if split == "dev" else "the last word: choose nothing by it"
    )
    lines = [
        f"# Written by flix.study.words. Evaluates {said}.",
        f"model: {json.dumps(model)}",
        "kind: seq2seq",
        f"output: run-{split}",
        "datasets:",
    ]
    for task in data.tasks:
        of_task = [cell for cell in data.cells if cell.task == task]
        lines += [
            f'  - files: "{task}/{{language}}.train.jsonl.gz"',
            f"    features: {{task: {task}}}",
            '    prompt: "{task}: {source}"',
        ]
        if any(cell.pairs("dev" if split == "dev" else "test") for cell in of_task):
            lines.append(f'    eval_files: "{task}/{{language}}.{split}.jsonl.gz"')
    lines.append("held_out:")
    held = [cell for cell in data.cells if cell.held_out == half]
    lines += [f"  - {{language: {cell.language}, task: {cell.task}}}" for cell in held]
    if not held:
        lines[-1] = "held_out: []"
    lines.append("implies:")
    lines += [f'  "task={task}": ["family={data.families[task]}"]' for task in data.tasks]
    lines.append('  "task=*": ["shared=all"]')
    if branches:
        lines += [f'  "language={code}": ["branch={data.branches[code]}"]' for code in data.languages]  # fmt: skip
    more = ", branch: 2" if branches else ""
    lines += [
        f"ranks: {{rule: by_group, language: 1, task: 2, family: 4, shared: 8{more}}}",
        "feature_dropout: {per_group: {language: 0.5}}",
        "temperature: 2.0",
        f"seed: {data.seed}",
        "training: {steps: 3000, batch_size: 64, learning_rate: 0.003}",
        "evaluation: {unseen_group_weights: {language: 0.0}}",
    ]
    return "\n".join(lines) + "\n"
