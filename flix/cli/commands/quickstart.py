"""``flix quickstart``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from flix.cli.folders import may_replace
from flix.cli.options import Json


def quickstart(
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Repeat with this many seeds.")] = 1,
    fast: Annotated[
        bool, typer.Option("--fast", help="A short run that only shows that everything works.")
    ] = False,
    as_json: Json = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where results go.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=10**9, help="Training steps.")] = None,
) -> None:
    """Train FLix and two LoRAs on real multilingual data, and compare them."""
    try:
        module = importlib.import_module("flix.quickstart.run")
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "flix":
            raise
        from flix.training.errors import missing_extra

        raise missing_extra("the quickstart", "quickstart", error) from None
    check_place(out or Path("quickstart-output"))
    code = module.main(seeds=seeds, fast=fast, as_json=as_json, out=out, steps=steps)
    raise typer.Exit(int(code or 0))


def check_place(folder: Path) -> None:
    """Refuse a folder in which the quickstart would overwrite files that are not its own.

    Raises:
        RunError: it would; the file is named.
    """
    from flix.report.writing import is_report
    from flix.training.errors import RunError

    results, page = folder / "results.json", folder / "report.html"
    for file, ours in (
        (results, may_replace(results, "arms", "sources")),
        (page, not page.is_file() or is_report(page)),
    ):
        if not ours:
            raise RunError(f"--out: the quickstart did not write {str(file)!r}, and would overwrite it; name another folder")  # fmt: skip
