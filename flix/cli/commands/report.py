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
        typer.Argument(metavar="RUN", help="Folders of runs; the first is compared with the others. Or one folder of a study."),
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
    """Write a page about runs: scores, curves, what features share, the mixture, examples, cost; or about a study."""
    from flix.report import ReportError, write_report
    from flix.study.page import is_study, write_study_report

    studies = [run for run in runs if is_study(run)]
    if studies and len(runs) > 1:
        raise ReportError(
            f"{str(studies[0])!r} is a study; a page is about one study, or about runs"
        )
    if studies and (rows or columns):
        raise ReportError("--rows and --columns are for runs; a study has no grid")
    if studies:
        written = write_study_report(studies[0], out, force=force)
    else:
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
