"""Files and datasets of a hub as datasets whose rows are checked: what a row lacks is said with its file and line.

A file is read once; what it gave is kept in the cache of ``datasets``, and mapped into memory from there, until the
file changes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flix.core.errors import FeatureError, FlixError, listed, near, shown
from flix.data.columns import kept_value
from flix.data.errors import DataError, missing_extra
from flix.data.files import Found, read_file
from flix.data.forms import FORMS

Features = dict[str, Any]
"""What a row activates, by group: a name, a list of names, or ``{name: weight}``."""

ACTIVATES = "flix_activates"
"""The column in which a dataset that is kept holds what its rows activate, as JSON."""

_LARGEST = float(np.finfo(np.float32).max)
_FORMAT = 1  # of what is kept; another number reads files anew


class Reading:
    """What is kept of a record: columns in their forms, and features.

    Args:
        columns: the form of each column that is kept: ``"text"`` (numbers become text), ``"shown"`` (anything, as
            text), ``"number"`` (text that is one, too), ``"texts"`` (a list) or ``"messages"`` (a list of ``{"role",
            "content"}``).
        features: what all rows activate.
        feature_columns: groups whose feature stands in a column of the row.
        limit: keep at most this many records, the first.
    """

    def __init__(
        self,
        columns: Mapping[str, str],
        features: Mapping[str, Any],
        feature_columns: Mapping[str, str],
        limit: int | None = None,
    ) -> None:
        self.columns = dict(columns)
        self.features = dict(features)
        self.feature_columns = dict(feature_columns)
        self.limit = limit
        self.format = _FORMAT

    def __call__(
        self, record: Mapping[str, Any], where: str, features: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A record's columns, and what it activates.

        Args:
            record: the record.
            where: where it stands, for messages.
            features: what its file activates.

        Raises:
            DataError: a column that is missing or of another form.
        """
        activates = {**self.features, **features}
        for group, column in self.feature_columns.items():
            activates[group] = feature_of(_column(record, column, where), group, where)
        row = {
            name: FORMS[form](
                _column(record, name, where, activates if form == "shown" else None), name, where
            )
            for name, form in self.columns.items()
        }
        row[ACTIVATES] = json.dumps(activates, ensure_ascii=False)
        return row


def load_files(files: Sequence[Found], reading: Reading) -> Any:
    """The records of files as one ``datasets.Dataset``, with :data:`ACTIVATES` beside the columns.

    Raises:
        DataError: a file that cannot be read or is damaged, or a row that is not of the form; file and line are named.
        MissingFrameworkError: ``datasets`` is not installed.
    """
    described = tuple((str(f.path), tuple(f.features.items()), digest(f.path)) for f in files)
    return _kept(_file_rows, {"files": described, "reading": reading}, reading)


def load_hub(name: str, subset: str | None, split: str, reading: Reading) -> tuple[Any, str]:
    """A split of a dataset of a hub, or of a folder, in the same form as :func:`load_files`; and a digest of its rows.

    Raises:
        DataError: it cannot be loaded, or a row is not of the form.
        MissingFrameworkError: ``datasets`` is not installed.
    """
    library = _library("a dataset of a hub")
    try:
        loaded = library.load_dataset(name, name=subset, split=split)
    except Exception as error:  # the hub, the network, a script or the files: all end here
        raise DataError(
            f"dataset {name!r} (split {split!r}) cannot be loaded: {_reason(error)}"
        ) from error
    kept = _kept(_hub_rows, {"loaded": loaded, "name": f"{name} [{split}]", "reading": reading}, reading)  # fmt: skip
    return kept, digest_of_rows(kept)


def stream_files(files: Sequence[Found], reading: Reading, **more: Any) -> Any:
    """The records of files as a ``datasets.IterableDataset``, read anew each time; columns of features are columns.

    Args:
        files: the files.
        reading: what is kept of a record.
        more: columns that all rows have.
    """
    described = tuple((str(f.path), (), "") for f in files)
    return _streamed(_file_rows, {"files": described, "reading": reading}, more)


def stream_hub(
    name: str, subset: str | None, split: str, reading: Reading, **more: Any
) -> tuple[Any, int | None, str]:
    """A split of a dataset of a hub, in the same form as :func:`stream_files`.

    Returns:
        The stream, how many rows it says that it has, and a digest of what its files are: a hub's commit, or sizes
        and times in a folder.

    Raises:
        DataError: it cannot be loaded.
    """
    library = _library("a dataset of a hub")
    try:
        builder = library.load_dataset_builder(name, name=subset)
        loaded = builder.as_streaming_dataset(split=split)
    except Exception as error:  # as in load_hub
        raise DataError(
            f"dataset {name!r} (split {split!r}) cannot be loaded: {_reason(error)}"
        ) from error
    known = (loaded.info.splits or {}).get(split)
    arguments = {"loaded": loaded, "name": f"{name} [{split}]", "reading": reading}
    rows = None if known is None else known.num_examples
    return _streamed(_hub_rows, arguments, more), rows, _state(builder, name, split)


def _state(builder: Any, name: str, split: str) -> str:
    """What a split's files are, as a digest; their addresses on a hub name its commit."""
    files = builder.config.data_files or {}
    told = []
    for file in map(str, files.get(split) or [file for some in files.values() for file in some]):
        place = Path(file)
        if place.is_file():
            found = place.stat()
            told.append([os.path.relpath(place, name), found.st_size, found.st_mtime_ns])
        else:
            told.append([file])
    return hashlib.sha256(json.dumps(sorted(told)).encode()).hexdigest()


def _streamed(rows: Callable[..., Iterator[Any]], arguments: dict[str, Any], more: dict[str, Any]) -> Any:  # fmt: skip
    given = {"rows": rows, "arguments": arguments, "more": more}
    return _library("streaming rows").IterableDataset.from_generator(_unpacked, gen_kwargs=given)


def _unpacked(
    rows: Callable[..., Iterator[Any]], arguments: dict[str, Any], more: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    columns = arguments["reading"].feature_columns
    for row in rows(**arguments):
        activates = json.loads(row.pop(ACTIVATES))
        yield {**row, **{group: activates[group] for group in columns}, **more}


def digest(file: Path) -> str:
    """The SHA-256 of a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def digest_of_rows(dataset: Any) -> str:
    """A digest of a dataset's values, in whatever pieces its cache holds them."""
    found = hashlib.sha256()
    if len(dataset):
        for table in dataset.with_format("arrow").iter(1000):
            for batch in table.combine_chunks().to_batches():
                found.update(batch.serialize())
    return found.hexdigest()


def with_features(dataset: Any) -> tuple[Any, tuple[str, ...]]:
    """A loaded dataset with a column for each group that its rows activate something of, and the groups.

    All rows' values of a group get one form: names, lists of names if a row has several, ``{name: weight}`` if a row
    has weights.
    """
    import pyarrow as pa  # type: ignore[import-untyped]

    if not len(dataset):
        return dataset.remove_columns(ACTIVATES), ()
    chunks = dataset.data.column(ACTIVATES)
    coded = pa.chunked_array([chunks.combine_chunks()]).dictionary_encode().chunk(0)
    said = [json.loads(text) for text in coded.dictionary.to_pylist()]
    groups = tuple(dict.fromkeys(group for row in said for group in row))
    for group in groups:
        values = pa.array(_of_one_form([row[group] for row in said]))
        dataset = dataset.add_column(group, values.take(coded.indices))
    return dataset.remove_columns(ACTIVATES), groups


def _of_one_form(values: list[Any]) -> list[Any]:
    if any(isinstance(value, Mapping) for value in values):
        several = [[value] if isinstance(value, str) else value for value in values]
        return [v if isinstance(v, Mapping) else dict.fromkeys(v, 1.0) for v in several]
    if any(isinstance(value, list) for value in values):
        return [[value] if isinstance(value, str) else value for value in values]
    return values


def _kept(rows: Callable[..., Iterator[Any]], arguments: dict[str, Any], reading: Reading) -> Any:
    """The rows as a dataset, from the cache if they were read before, and anew if the cache is damaged."""
    library = _library("reading rows")
    features = {name: _types(library)[form] for name, form in reading.columns.items()}
    features[ACTIVATES] = library.Value("string")
    again = copy.copy(reading)
    again.format = -_FORMAT  # another place in the cache
    for given in (arguments, {**arguments, "reading": again}):
        try:
            return library.Dataset.from_generator(
                rows, features=library.Features(features), gen_kwargs=given
            )
        except Exception as error:
            causes = list(_causes(error))
            for cause in causes:
                if isinstance(cause, FlixError):
                    raise cause from None
                if isinstance(cause, ImportError):
                    raise missing_extra("reading rows", "transformers", cause) from None
            if next(rows(**arguments), None) is None:  # which each version says in its own way
                return library.Dataset.from_dict({name: [] for name in features})
            said = next((c for c in causes if isinstance(c, OSError)), error)
            generating = isinstance(error, library.exceptions.DatasetGenerationError)
            if generating and said is error:
                raise
            if generating or given is not arguments:
                raise DataError(
                    f"rows cannot be kept in the cache of datasets, {str(library.config.HF_DATASETS_CACHE)!r}: "
                    f"{_reason(said)}; give it room, remove what is damaged there, or name another folder in the environment "
                    "variable HF_DATASETS_CACHE"
                ) from error
    raise AssertionError  # the last one returns or raises


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: BaseException) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _types(library: Any) -> dict[str, Any]:
    text = library.Value("string")
    said = {"role": text, "content": text}
    several = getattr(library, "List", library.Sequence)
    return {
        "text": text,
        "shown": text,
        "number": library.Value("float64"),
        "texts": several(text),
        "messages": [said],
    }


def _library(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra(what, "transformers", error) from None
    return datasets


def _file_rows(files: Sequence[Any], reading: Reading) -> Iterator[dict[str, Any]]:
    count = 0
    for path, features, _ in files:
        for where, record in read_file(Path(path)):
            if reading.limit is not None and count >= reading.limit:
                return
            count += 1
            yield reading(record, where, dict(features))


def _hub_rows(loaded: Any, name: str, reading: Reading) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(loaded):
        if reading.limit is not None and number >= reading.limit:
            return
        yield reading(record, f"{name} row {number}", {})


def _column(
    record: Mapping[str, Any], column: str, where: str, groups: Mapping[str, Any] | None = None
) -> Any:
    """A record's column; with groups, of one that a prompt names."""
    if column in record:
        return record[column]
    if groups is not None:
        there = [*record, *groups]
        raise DataError(
            f"{where}: the prompt needs {column!r}{near(column, there)}; there is: {listed(there)}"
        )
    raise DataError(
        f"{where}: no column {column!r}{near(column, record)}; it has: {listed(record)}"
    )


def feature_of(value: Any, group: str, where: str) -> Any:
    """What a row's column says of a group, with its names as registries keep them.

    Raises:
        DataError: neither a name, nor a list of names, nor ``{name: weight}``; or an ill-formed name or weight.
    """
    try:
        if isinstance(value, str | list | Mapping):
            kept = kept_value(group, value)
            for name, weight in kept.items() if isinstance(kept, Mapping) else ():
                if abs(weight) > _LARGEST:
                    raise FeatureError(
                        f"the weight of {group}={name} must be finite in float32, got {shown(weight)}"
                    )
            return kept
        raise FeatureError(
            f"the {group} must be a name, a list of names or {{name: weight}}, got {shown(value)}"
        )
    except FeatureError as error:
        raise DataError(f"{where}: {error}") from None
