"""``flix share``."""

from __future__ import annotations

from typing import Annotated

import typer

from flix.cli.features import parse_choice
from flix.cli.folders import check_out
from flix.cli.options import AdapterFolder, Force, Json, Out
from flix.cli.result import write_adapter
from flix.core.adapter.files import load_adapter
from flix.core.adapter.sharing import select_features


def share(
    adapter: AdapterFolder,
    features: Annotated[
        list[str],
        typer.Option("--features", metavar="GROUP=NAME,...", help="The features to share."),
    ],
    out: Out,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write some features, and what they imply, as an adapter of their own."""
    held = load_adapter(adapter)
    chosen = parse_choice(features, held.config.registry)
    check_out(out, force, adapter)
    heads = [str(adapter)] if held.heads else []
    write_adapter(select_features(held, chosen), out, as_json, "shared", heads)
