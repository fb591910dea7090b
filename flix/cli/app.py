"""The command line: each command is a file of :mod:`flix.cli.commands`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from flix._version import __version__
from flix.cli.commands.backends import backends
from flix.cli.commands.combine import combine
from flix.cli.commands.evaluate import evaluate
from flix.cli.commands.export import export
from flix.cli.commands.import_ import import_
from flix.cli.commands.init import init
from flix.cli.commands.inspect import inspect
from flix.cli.commands.merge import merge
from flix.cli.commands.plan import plan
from flix.cli.commands.predict import predict
from flix.cli.commands.quickstart import quickstart
from flix.cli.commands.report import report
from flix.cli.commands.share import share
from flix.cli.commands.study import study
from flix.cli.commands.train import train
from flix.cli.console import guarded

app = typer.Typer(
    name="flix",
    help="FLix: featurized low-rank mixtures. One pretrained model, many tasks in many languages.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS: tuple[tuple[Callable[..., Any], str], ...] = (
    (quickstart, "flix quickstart --fast"),
    (init, "flix init 'ner/{language}.train.jsonl.gz' topic --out africa.yaml"),
    (plan, "flix plan train.yaml --explain"),
    (train, "flix train train.yaml --resume"),
    (evaluate, "flix evaluate train.yaml runs/adapter --compose language=off"),
    (predict, "flix predict runs/adapter rows.jsonl --features language=hau,task=ner"),
    (report, "flix report runs/flix runs/lora --out report.html"),
    (study, "flix study study.yaml --only flix --list"),
    (inspect, "flix inspect runs/adapter --layers"),
    (
        merge,
        "flix merge runs/adapter --base google/mt5-small --features language=hau,task=ner --out merged",
    ),
    (
        export,
        "flix export runs/adapter --base google/mt5-small --all 'language=*,task=ner|pos' --out loras",
    ),
    (import_, "flix import hau=loras/hau swa=loras/swa --group language --out adapter"),
    (share, "flix share runs/adapter --features language=hau --out hausa"),
    (combine, "flix combine hausa swahili --conflicts keep --out both"),
    (backends, "flix backends --json"),
)
"""The commands in the order of the help, each with an example."""


def _version(asked: bool) -> None:
    if asked:
        print(f"flix {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """FLix: featurized low-rank mixtures. One pretrained model, many tasks in many languages."""


for _command, _example in COMMANDS:
    app.command(_command.__name__.rstrip("_"), epilog=f"Example: {_example}")(guarded(_command))
