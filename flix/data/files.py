"""Files by pattern, and their records: JSONL, CSV, TSV, Parquet; compressed with gzip or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from flix.core.errors import listed, near, shown
from flix.data.errors import DataError, missing_extra

Record = tuple[str, Mapping[str, Any]]
"""(where it is, for messages; the record)."""

_LONGEST_FIELD = 2**27
_GROUP = re.compile(r"\{([^\W\d]\w*)\}")
_SIGNS = re.compile(r"\*\*/|\[[^\]]+\]|\*+|.", re.DOTALL)
_GLOB = {"**/": "(?:.*/)?", "*": "[^/]*", "**": ".*", "?": "[^/]"}


@dataclass(frozen=True)
class Found:
    """A file that a pattern matches.

    Attributes:
        path: the file.
        features: what its name says, by group: of ``ner/{language}.jsonl``, ``{"language": "hau"}``.
    """

    path: Path
    features: Mapping[str, str] = field(default_factory=dict)


def find_files(pattern: str, folder: Path) -> list[Found]:
    """The files of a pattern, ascending: the one that is called so, whatever it holds, or those that match.

    Args:
        pattern: relative to the folder, or absolute; ``~`` is the home folder. ``*``, ``?``, ``[...]`` and ``**`` mean
            what they mean in a shell; ``{group}`` stands for a part of a name, the file's feature of the group.
        folder: the configuration's.

    Raises:
        DataError: no file is called so or matches.
    """
    path = os.path.expanduser(pattern)
    exact = folder / path
    try:
        if exact.is_file():
            return [Found(exact)]
        groups = groups_of(pattern)
        named = re.compile(_expression(exact.as_posix()) if groups else ".*", re.DOTALL)
        root, rest = folder, Path(_GROUP.sub("*", path))
        if rest.is_absolute():
            root, rest = Path(rest.anchor), rest.relative_to(rest.anchor)
        found = [
            Found(file, match.groupdict())
            for file in sorted(root.glob(str(rest)))
            if file.is_file() and (match := named.fullmatch(file.as_posix()))
        ]
        if found:
            return found
        if exact.is_dir():
            raise DataError(f"{str(exact)!r} is a folder; name its files, as in {pattern}/*.jsonl")
        present = [p.name for p in exact.parent.iterdir()] if exact.parent.is_dir() else []
    except (ValueError, NotImplementedError, IndexError, re.error) as error:
        raise DataError(f"{pattern!r} is neither a file nor a pattern: {error}") from None
    except OSError as error:
        raise DataError(f"{str(exact)!r} cannot be read: {error.strerror or error}") from None
    raise DataError(f"no file matches {str(exact)!r}{near(exact.name, present)}")


def groups_of(pattern: str) -> list[str]:
    """The groups whose features a pattern reads from files' names."""
    return list(dict.fromkeys(_GROUP.findall(pattern)))


def _expression(pattern: str) -> str:
    """A pattern as a regular expression: what stands for a group is captured; all else matches what a glob does."""
    parts = _GROUP.split(pattern)
    known: set[str] = set()
    text = ""
    for number, part in enumerate(parts):
        if not number % 2:
            signs = _SIGNS.findall(part)
            text += "".join(
                "[^/]" if len(s) > 2 and s[0] == "[" else _GLOB.get(s, re.escape(s)) for s in signs
            )
        elif part in known:
            text += f"(?P={part})"
        else:
            known.add(part)
            text += f"(?P<{part}>[^/]+?)"
    return text


def read_file(file: Path) -> Iterator[Record]:
    """Every record of a file, by its name's ending: ``.csv``, ``.tsv``, ``.parquet``, anything else is JSONL.

    Raises:
        DataError: a file that cannot be read or is damaged; the line is named.
        MissingFrameworkError: Parquet without the package that reads it.
    """
    names = [suffix.lower() for suffix in file.suffixes]
    ending = names[-2] if names[-1:] == [".gz"] and len(names) > 1 else "".join(names[-1:])
    if ending == ".parquet":
        return _read_parquet(file)
    if ending in (".csv", ".tsv"):
        return _read_csv(file, "\t" if ending == ".tsv" else ",")
    return read_jsonl(file)


def _opened(file: Path) -> IO[str]:
    """A text file; a byte-order mark is passed over, and gzip is told by its first bytes."""
    with open(file, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    if packed:
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")


def _readable(read: Iterator[Record], file: Path | str) -> Iterator[Record]:
    """The same records, with what can go wrong in any file said in one way."""
    try:
        yield from read
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason})") from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{file}: damaged gzip: {error}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def read_jsonl(file: Path) -> Iterator[Record]:
    """(``file:line``, record) for every line of a JSONL file; blank lines are passed over.

    Raises:
        DataError: a file that cannot be read, or a line that is no JSON object.
    """
    return _readable(_json_lines(file), file)


def _json_lines(file: Path) -> Iterator[Record]:
    with _opened(file) as lines:
        yield from json_records(lines, str(file))


def read_stream(stream: BinaryIO, name: str) -> Iterator[Record]:
    """(``name:line``, record) for every line of JSONL in an open stream, which is read as files are.

    Args:
        stream: the bytes.
        name: what messages call it.

    Raises:
        DataError: a stream that cannot be read, or a line that is no JSON object.
    """
    return _readable(_stream_lines(stream, name), name)


def _stream_lines(stream: BinaryIO, name: str) -> Iterator[Record]:
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        yield from json_records(lines, name)
    finally:
        lines.detach()  # the stream is not ours to close


def json_records(lines: Iterable[str], name: str) -> Iterator[Record]:
    """The records of lines of JSON; blank lines are passed over.

    Args:
        lines: the lines.
        name: what messages call them.

    Raises:
        DataError: a line that is no JSON object; it is named.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: a row is a JSON object, got {line.strip()[:60]}")
        yield where, record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _read_csv(file: Path, delimiter: str) -> Iterator[Record]:
    return _readable(_csv_lines(file, delimiter), file)


def _csv_lines(file: Path, delimiter: str) -> Iterator[Record]:
    """Every field is text, as it stands: "NA" is a name, and so is "01"."""
    longest = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with _opened(file) as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            try:
                header = next(reader, [])
                if len(set(header)) < len(header) or "" in header:
                    raise DataError(
                        f"{file}:1: the first line names the columns, each once; got {listed(map(repr, header))}"
                    )
                for fields in reader:
                    where = f"{file}:{reader.line_num}"
                    if not fields:
                        continue
                    if len(fields) != len(header):
                        raise DataError(
                            f"{where}: {len(fields)} fields, but the first line names {len(header)} columns"
                        )
                    yield where, dict(zip(header, fields, strict=True))
            except csv.Error as error:
                raise DataError(f"{file}:{reader.line_num}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(longest)


def _read_parquet(file: Path) -> Iterator[Record]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_extra("reading Parquet", "transformers", error) from None
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                for record in batch.to_pylist():
                    yield f"{file} row {number}", record
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or shown(str(error))
        raise DataError(f"{file}: not readable as Parquet: {reason}") from None
