"""``flix predict``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from flix.cli.console import quiet, show, show_json
from flix.cli.features import parse_features
from flix.cli.options import AdapterFolder, Json
from flix.cli.streams import say


def predict(
    adapter: AdapterFolder,
    given: Annotated[
        str, typer.Argument(metavar="INPUT", help='Rows: JSONL, CSV, TSV or Parquet, or "-".')
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Where the answers go, JSONL.")
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option("--features", metavar="TEXT", help="Features of rows that name none."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Where the base model is now.")
    ] = None,
    unknown: Annotated[
        str | None,
        typer.Option("--unknown", help="What unknown features do: error, skip or mean."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=10**6, help="Rows at a time.")
    ] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, max=10**6, help="The longest answer.")
    ] = None,
    num_beams: Annotated[
        int | None, typer.Option("--num-beams", min=1, max=1000, help="1 is greedy.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer rows that name their features, in mixed batches."""
    from flix.core.adapter.files import read_description

    config, _ = read_description(adapter)
    row = parse_features(features, config.registry) if features else {}
    _check_output(output)
    records = _records(given)
    quiet()
    from flix.tasks.prediction import Predictor

    predictor = Predictor(
        adapter, base=base, features=row, unknown=unknown, batch_size=batch_size,
        max_new_tokens=max_new_tokens, num_beams=num_beams,
    )  # fmt: skip
    count = 0
    with (
        open(output, "w", encoding="utf-8", errors="surrogatepass")
        if output
        else _Standard() as out
    ):
        for found in predictor(records):
            out.write(json.dumps(found, ensure_ascii=False) + "\n")
            count += 1
    if output is not None:
        show_json({"output": str(output), "rows": count}) if as_json else show(
            f"{count} rows: {output}"
        )


class _Standard:
    """Standard output, as a file."""

    def __enter__(self) -> _Standard:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def write(self, text: str) -> None:
        """A line."""
        say(text.rstrip("\n"))


def _check_output(output: Path | None) -> None:
    from flix.training.errors import RunError

    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise RunError(f"--output: {str(output)!r} cannot be a file")


def _records(given: str) -> Iterator[Any]:
    from flix.data.files import find_files, json_records, read_file

    if given == "-":
        return json_records(sys.stdin, "standard input")
    files = find_files(given, Path("."))
    return (record for file in files for record in read_file(file.path))
