"""``flix import``."""

from __future__ import annotations

from typing import Annotated

import typer

from flix.cli.features import parse_folders
from flix.cli.folders import check_out
from flix.cli.options import Force, Json, Out
from flix.cli.result import write_adapter
from flix.core.errors import ConfigError
from flix.core.peft.importing import from_peft


def import_(
    loras: Annotated[
        list[str],
        typer.Argument(metavar="NAME=FOLDER...", help="A LoRA's folder, and its feature's name."),
    ],
    group: Annotated[str, typer.Option("--group", help="The group that they become.")],
    out: Out,
    source: Annotated[str, typer.Option("--from", help="The format: peft.")] = "peft",
    skip_modules: Annotated[
        bool,
        typer.Option(
            "--skip-modules", help="Leave out whole modules that were trained with a LoRA."
        ),
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make an adapter of LoRAs that PEFT wrote: each becomes a feature, together they are a group."""
    if source != "peft":
        raise ConfigError(f"--from: flix imports from peft, got {source!r}")
    folders = parse_folders(loras)
    check_out(out, force, *folders.values())
    write_adapter(
        from_peft(folders, group, skip_modules=skip_modules), out, as_json, "imported", []
    )
