"""``flix evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flix.cli.console import make_reporter, quiet, show, show_json
from flix.cli.folders import may_replace
from flix.cli.options import AdapterFolder, ConfigFile, Json
from flix.cli.scores import show_scores


def evaluate(
    config: ConfigFile,
    adapter: AdapterFolder,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the results as JSON too.")
    ] = None,
    compose: Annotated[
        list[str] | None,
        typer.Option(
            "--compose",
            metavar="GROUP=HOW",
            help="What combinations never trained activate: language=off, language=0.5, language=parent:zul, "
            "language=searched.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score an adapter's answers, seen and held-out combinations apart."""
    from flix.training.errors import RunError
    from flix.training.reading import read_settings

    settings = read_settings(config)
    if out is not None and (out.is_dir() or (out.parent.exists() and not out.parent.is_dir())):
        raise RunError(f"--out: {str(out)!r} cannot be a file")
    if out is not None and not may_replace(out, "cells", lacks="training"):
        raise RunError(
            f"--out: {str(out)!r} is there, and holds no scores of flix evaluate; name another file"
        )
    from flix.training import evaluation
    from flix.transformers.journal import plain

    quiet()
    result = evaluation.evaluate(
        settings, adapter, compose=compose or (), reporter=make_reporter(as_json)
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plain(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        out.write_text(text, encoding="utf-8")
    if as_json:
        show_json({"adapter": str(adapter), **result})
        return
    show_scores(result)
    for cell, row in result.get("searched", {}).items():
        show(f"searched for {cell}: {told(row)}")


def told(row: dict[str, Any]) -> str:
    """A composition in a line, its weights rounded."""
    parts = []
    for group, value in row.items():
        weights = {value: 1.0} if isinstance(value, str) else value or {}
        parts += [f"{weight:.2f} {group}={name}" for name, weight in weights.items() if abs(weight) >= 0.005]  # fmt: skip
    return " + ".join(parts) or "nothing"
