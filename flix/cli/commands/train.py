"""``flix train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flix.cli.console import make_reporter, quiet, show, show_json
from flix.cli.options import ConfigFile, Json
from flix.cli.scores import show_scores
from flix.core.errors import FlixError
from flix.core.progress import Reporter


def train(
    config: ConfigFile,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard an earlier run in the output folder.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html about the run.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Train an adapter as a configuration says."""
    from flix.training.reading import read_settings

    settings = read_settings(config)
    from flix.training import run

    quiet()
    reporter = make_reporter(as_json)
    result = run.train(settings, resume=resume, overwrite=overwrite, reporter=reporter)
    if not result.metrics:  # another process writes
        return
    page = _page(result.output, reporter) if report else None
    if as_json:
        places = {"output": result.output, "adapter": result.adapter, "report": page}
        show_json({**{name: p and str(p) for name, p in places.items()}, **result.metrics})
        return
    if result.metrics["cells"]:
        show_scores(result.metrics)
    training = result.metrics["training"]
    last = f", last loss {training['losses'][-1]['loss']:.3f}" if training["losses"] else ""
    show(f"{training['steps']} steps in {training['seconds']:.1f} s{last}")
    show(f"adapter: {result.adapter}")
    if page is not None:
        show(f"report: {page}")


def _page(folder: Path, reporter: Reporter) -> Path | None:
    """The page about a run. That it cannot be written is said, and no error: the run is there."""
    from flix.report import write_report

    try:
        return write_report([folder]).out
    except (FlixError, OSError) as error:
        reporter.note(f"note: no report was written: {error}")
        return None
