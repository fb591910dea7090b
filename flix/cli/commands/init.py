"""``flix init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flix.cli.console import show, show_json, show_table
from flix.cli.drafting import draft, features_of, rows_of
from flix.cli.guessing import KINDS, Guess, check_together, guess
from flix.cli.looking import Looked, check_no_data, find_data, look
from flix.cli.options import Json
from flix.core.errors import ConfigError, listed, near
from flix.core.files import make_folder, write_file
from flix.data.errors import DataError


def init(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA", help="Files, folders, or patterns such as 'ner/{language}.train.jsonl.gz'."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The configuration to write.")
    ] = Path("train.yaml"),
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The base model: folder or hub name.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help=f"What all data are: {', '.join(KINDS)}; default: guessed.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Draft a training configuration from a look at data: its files' names, its columns, its sizes."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"--kind: no kind {kind!r}{near(kind, KINDS)}; the kinds are: {listed(KINDS)}")  # fmt: skip
    if model is not None and not model.strip():
        raise ConfigError("--model must name a folder or a model of the hub, got ''")
    if out.is_dir():
        raise ConfigError(f"--out must be a file, but {str(out)!r} is a folder")
    if out.exists() and not force:
        raise ConfigError(f"--out: {str(out)!r} exists already; --force overwrites it")
    found = find_data(data)
    check_no_data(out, found)
    looked = [one for files in found if (one := look(files)).rows]
    if not looked:
        raise DataError(f"no rows for training in {listed(map(repr, data))}")
    guesses = [guess(one, kind) for one in looked]
    check_together({one.files.pattern: found for one, found in zip(looked, guesses, strict=True)})
    text = draft(looked, guesses, model, out)
    _check(text, out)
    make_folder(out.parent)
    write_file(out, text.encode("utf-8"))
    _tell(looked, guesses, out, as_json)


def _check(text: str, out: Path) -> None:
    """The draft must be one that ``flix train`` reads."""
    from flix.training.reading import parse_settings

    parse_settings(text, str(out), out.parent)


def _tell(looked: list[Looked], guesses: list[Guess], out: Path, as_json: bool) -> None:
    cells = rows_of(looked)
    groups = features_of(cells)
    if as_json:
        found: list[dict[str, Any]] = [
            {
                "files": one.files.pattern, "eval_files": one.files.evaluation, "kind": g.kind, "rows": one.rows,
                "evaluation_rows": sum(one.evaluation_cells.values()), "cells": len(one.cells),
            }
            for one, g in zip(looked, guesses, strict=True)
        ]  # fmt: skip
        show_json({"out": str(out), "datasets": found, "features": groups})
        return
    show_table(
        ["files", "kind", "cells", "rows", "evaluation"],
        [
            [_cut(one.files.pattern), g.kind, len(one.cells), one.rows, sum(one.evaluation_cells.values())]
            for one, g in zip(looked, guesses, strict=True)
        ],
    )  # fmt: skip
    for group, rows in groups.items():
        names = ", ".join(rows)
        show(f"{group}: {len(rows)} feature{'s' if len(rows) != 1 else ''}: {_cut(names, 60)}")
    show(f"wrote {out}; next: flix plan {out}")


def _cut(text: str, most: int = 34) -> str:
    """The end of a long path, the beginning of a long list."""
    if len(text) <= most:
        return text
    return f"...{text[-(most - 3) :]}" if "/" in text else f"{text[: most - 3]}..."
