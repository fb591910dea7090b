"""Rows from where the configuration says: JSONL files, or a dataset of a hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.checks import is_number
from flix.core.errors import listed, near
from flix.training.errors import DataError, missing_extra
from flix.training.settings import DatasetSettings, Settings

Features = dict[str, Any]
"""What a row activates, by group: a name, a list of names, or ``{name: weight}``."""

_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}|[{}]")


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        prompt: the model's input.
        source: the source column alone.
        target: the wanted output.
        features: what it activates.
        dataset: the number of its dataset in the configuration.
        evaluation: whether it comes from evaluation files.
    """

    prompt: str
    source: str
    target: str
    features: Features
    dataset: int
    evaluation: bool


def read_rows(settings: Settings) -> list[Row]:
    """All rows of all datasets.

    Raises:
        DataError: a file that is missing or damaged, or a row without a column that is needed; file and line are
            named.
        MissingFrameworkError: ``datasets`` is needed and not installed.
    """
    rows: list[Row] = []
    for number, dataset in enumerate(settings.datasets):
        for evaluation in (False, True):
            found = _records(dataset, settings.base_folder, evaluation)
            for count, (where, record) in enumerate(found):
                if dataset.limit is not None and count >= dataset.limit:
                    break
                rows.append(_row(record, where, dataset, number, evaluation))
    return rows


def dataset_name(dataset: DatasetSettings) -> str:
    """What a dataset is called in messages."""
    if dataset.name or dataset.hub:
        return str(dataset.name or dataset.hub)
    return dataset.files if isinstance(dataset.files, str) else listed(dataset.files or ())


def _records(
    dataset: DatasetSettings, folder: Path, evaluation: bool
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it is, record) for every record of one half of a dataset."""
    if dataset.hub is not None:
        split = dataset.eval_split if evaluation else dataset.split
        if split is not None:
            yield from _from_hub(dataset, folder, split)
        if not evaluation or dataset.eval_files is None:
            return
    patterns = dataset.eval_files if evaluation else dataset.files
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        for file in _files(pattern, folder, dataset):
            yield from read_jsonl(file)


def _files(pattern: str, folder: Path, dataset: DatasetSettings) -> list[Path]:
    absolute = Path(pattern)
    if absolute.is_absolute():
        root = Path(absolute.anchor)
        found = sorted(root.glob(str(absolute.relative_to(root))))
    else:
        found = sorted(folder.glob(pattern))
    files = [path for path in found if path.is_file()]
    if not files:
        place = (folder / pattern).parent
        present = [p.name for p in place.iterdir()] if place.is_dir() else []
        hint = near(Path(pattern).name, present)
        raise DataError(
            f"dataset {dataset_name(dataset)!r}: no file matches {str(folder / pattern)!r}{hint}"
        )
    return files


def read_jsonl(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(``file:line``, record) for every line of a JSONL file; blank lines are passed over.

    Raises:
        DataError: a file that cannot be read, or a line that is no JSON object.
    """
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}: not valid JSON: {error}") from None
                if not isinstance(record, dict):
                    raise DataError(f"{where}: a row is a JSON object, got {line.strip()[:60]}")
                yield where, record
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def _from_hub(
    dataset: DatasetSettings, folder: Path, split: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("a dataset from a hub", "transformers", error) from None
    local = folder / str(dataset.hub)
    name = str(local) if local.exists() else str(dataset.hub)
    try:
        loaded = datasets.load_dataset(name, name=dataset.subset, split=split)
    except Exception as error:  # the hub, the network, a script or the files: all end here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"dataset {name!r} (split {split!r}) cannot be loaded: {reason}") from error
    for number, record in enumerate(loaded):
        yield f"{name} [{split}] row {number}", record


def _row(
    record: Mapping[str, Any], where: str, dataset: DatasetSettings, number: int, evaluation: bool
) -> Row:
    features: Features = dict(dataset.features)
    for group, column in dataset.feature_columns.items():
        features[group] = _feature(_column(record, column, where), group, where)
    source = _text(_column(record, dataset.source, where), dataset.source, where)
    target = _text(_column(record, dataset.target, where), dataset.target, where)
    prompt = source
    if dataset.prompt is not None:
        prompt = fill(dataset.prompt, {**record, **_named(features)}, where)
    return Row(prompt, source, target, features, number, evaluation)


def _column(record: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in record:
        raise DataError(
            f"{where}: no column {column!r}{near(column, record)}; it has: {listed(record)}"
        )
    return record[column]


def _text(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if is_number(value):
        return str(value)
    raise DataError(f"{where}: column {column!r} must hold text, got {value!r}")


def _feature(value: Any, group: str, where: str) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
        return list(value)
    if isinstance(value, dict) and value:
        return {k: v for k, v in value.items() if v is not None}
    raise DataError(
        f"{where}: the {group} must be a name, a list of names or {{name: weight}}, got {value!r}"
    )


def _named(features: Features) -> dict[str, str]:
    return {group: "+".join(names_of(value)) for group, value in features.items()}


def names_of(value: Any) -> Sequence[str]:
    """The names in what a row says of one group."""
    return [value] if isinstance(value, str) else list(value)


def fill(template: str, values: Mapping[str, Any], where: str) -> str:
    """A template with ``{name}`` replaced by values; ``{{`` and ``}}`` are braces.

    Raises:
        DataError: a name without a value, or a brace without its partner.
    """

    def put(match: re.Match[str]) -> str:
        text, name = match.group(0), match.group(1)
        if text in ("{{", "}}"):
            return text[0]
        if name is None:
            raise DataError(
                f"prompt {template!r}: a single {text!r}; write {text * 2!r} for the brace itself"
            )
        if name not in values:
            raise DataError(
                f"{where}: prompt {template!r} needs {name!r}{near(name, values)}; there is: {listed(values)}"
            )
        return str(values[name])

    return _FIELD.sub(put, template)
