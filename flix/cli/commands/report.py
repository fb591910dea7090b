"""``flix report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flix.cli.console import show, show_json
from flix.cli.options import Json


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders of runs; the first is compared with the others."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page to write; default: report.html in the first run's folder."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option("--rows", metavar="GROUP", help="The group whose features are "
            "the rows of the grids.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="GROUP", help="The group whose features "
            "are their columns.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a file that is not a flix report.")
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a page about runs: scores, curves, what features share, the mixture, examples, cost, origin."""
    from flix.report import write_report

    written = write_report(runs, out, rows=rows, columns=columns, force=force)
    if as_json:
        show_json(
            {
                "out": str(written.out),
                "bytes": written.size,
                "short": written.short,
                "missing": written.missing,
            }
        )
        return
    for line in written.short:
        show(line)
    for line in written.missing:
        show(f"not on the page: {line}")
    show(f"report: {written.out} ({written.size / 1000:,.0f} kB)")
