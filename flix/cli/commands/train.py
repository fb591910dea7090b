"""``flix train``."""

from __future__ import annotations

from typing import Annotated

import typer

from flix.cli.console import make_reporter, quiet, show, show_json
from flix.cli.options import ConfigFile, Json
from flix.cli.scores import show_scores


def train(
    config: ConfigFile,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard an earlier run in the output folder.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as a configuration says."""
    from flix.training.reading import read_settings

    settings = read_settings(config)
    from flix.training import run

    quiet()
    result = run.train(
        settings, resume=resume, overwrite=overwrite, reporter=make_reporter(as_json)
    )
    if not result.metrics:  # another process writes
        return
    if as_json:
        show_json({"output": str(result.output), "adapter": str(result.adapter), **result.metrics})
        return
    if result.metrics["cells"]:
        show_scores(result.metrics)
    training = result.metrics["training"]
    last = f", last loss {training['losses'][-1]['loss']:.3f}" if training["losses"] else ""
    show(f"{training['steps']} steps in {training['seconds']:.1f} s{last}")
    show(f"adapter: {result.adapter}")
