"""``flix combine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flix.cli.folders import check_out
from flix.cli.options import Force, Json, Out
from flix.cli.result import write_adapter
from flix.core.adapter.files import load_adapter
from flix.core.adapter.sharing import combine_adapters
from flix.core.errors import AdapterError


def combine(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Two adapters' folders or more.")
    ],
    out: Out,
    conflicts: Annotated[
        str,
        typer.Option(
            "--conflicts",
            help="What counts where a feature differs: error, keep (the earlier) or replace (the later).",
        ),
    ] = "error",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Put the features of several adapters together as one."""
    if len(adapters) < 2:
        raise AdapterError(f"combining needs two adapters or more, got {len(adapters)}")
    names = [str(folder) for folder in adapters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise AdapterError(f"the adapter {twice[0]!r} is given twice")
    held = {str(folder): load_adapter(folder) for folder in adapters}
    check_out(out, force, *adapters)
    combined = combine_adapters(held, conflicts=conflicts)
    heads = [folder for folder, adapter in held.items() if adapter.heads]
    write_adapter(combined, out, as_json, "combined", heads)
