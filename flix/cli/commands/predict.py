"""``flix predict``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flix.cli.console import quiet, show, show_json
from flix.cli.features import parse_features
from flix.cli.options import AdapterFolder, Json
from flix.cli.streams import say
from flix.cli.written import json_text, output_encoding, write_lines
from flix.core.errors import RunError, listed, near
from flix.core.features.names import normal_group

if TYPE_CHECKING:
    from flix.core.features.registry import FeatureRegistry
    from flix.data.files import Record


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
    records = _records(given, config.registry, row, output)
    quiet()
    from flix.tasks.prediction import Predictor

    predictor = Predictor(
        adapter, base=base, features=row, unknown=unknown, batch_size=batch_size,
        max_new_tokens=max_new_tokens, num_beams=num_beams,
    )  # fmt: skip
    encoding = "utf-8" if output else output_encoding()
    lines = (json_text(found, encoding=encoding) for found in predictor(records))
    if output is None:
        for line in lines:
            say(line)
        return
    count = write_lines(output, lines)
    show_json({"output": str(output), "rows": count}) if as_json else show(f"{count} rows: {output}")  # fmt: skip


def _records(
    given: str, registry: FeatureRegistry, row: Mapping[str, Any], output: Path | None
) -> Iterator[Any]:
    """Where each row stands, the row, and what its file's name says of it."""
    from flix.data.errors import DataError
    from flix.data.files import find_files, read_file, read_stream

    if given == "-":
        if sys.stdin is None:
            raise DataError(
                "standard input is closed; INPUT is a file, or - with rows on standard input"
            )
        _check_output(output, [(_standard_input(), "standard input")])
        return (
            (*record, {}) for record in _writable(read_stream(sys.stdin.buffer, "standard input"))
        )
    files = find_files(given, Path("."))
    _check_output(output, [(os.stat(file.path), str(file.path)) for file in files])
    for group in files[0].features:
        if normal_group(group) not in registry.groups:
            raise DataError(
                f"{given!r}: the adapter has no group {group!r}{near(group, registry.groups)}; {{group}} in a name stands for "
                f"the files' features of one of its groups, which are: {listed(registry.groups)}. * stands for anything"
            )
        if normal_group(group) in row:
            raise DataError(
                f"{given!r}: the files' names give the {group}, and so does --features; leave it out of one of the two"
            )
    return (
        (*record, {normal_group(group): name for group, name in file.features.items()})
        for file in files
        for record in _writable(read_file(file.path))
    )


def _writable(records: Iterator[Record]) -> Iterator[Record]:
    """The same records; one that cannot be written again is refused before anything is answered."""
    from flix.data.errors import DataError

    for where, record in records:
        for column, value in record.items():
            try:
                json_text(value)
            except (TypeError, RecursionError) as error:
                raise DataError(
                    f"{where}: column {column!r} cannot be written as JSON ({error}); leave it out of the file"
                ) from None
        yield where, record


def _standard_input() -> os.stat_result | None:
    try:
        return os.fstat(sys.stdin.fileno())
    except (OSError, ValueError):  # no file, as in tests
        return None


def _check_output(output: Path | None, inputs: Sequence[tuple[os.stat_result | None, str]]) -> None:
    """Refuse a file that cannot be written, or that is read."""
    if output is None:
        return
    if output.is_dir() or not output.parent.is_dir():
        raise RunError(f"--output: {str(output)!r} cannot be a file")
    if not output.is_file():
        return
    there = os.stat(output)
    for read, name in inputs:
        if read is not None and os.path.samestat(read, there):
            raise RunError(
                f"--output: {str(output)!r} is also read, as {name}; give the answers a file of their own"
            )
