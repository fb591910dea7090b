"""Rows from where the configuration says: files, or a dataset of a hub."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix.core.checks import is_number
from flix.core.errors import FeatureError, listed, near, shown
from flix.core.features.names import normal_group
from flix.data.columns import kept_value
from flix.data.files import find_files, read_file
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
        declared = _declared(dataset)
        for evaluation in (False, True):
            found = _records(dataset, settings.base_folder, evaluation)
            for count, (where, record) in enumerate(found):
                if dataset.limit is not None and count >= dataset.limit:
                    break
                rows.append(_row(record, where, dataset, declared, number, evaluation))
    return rows


def _declared(dataset: DatasetSettings) -> Features:
    """What all rows of a dataset activate, with names as registries keep them."""
    found: Features = {}
    try:
        for given, value in dataset.features.items():
            group = normal_group(given)
            if group in found:
                raise FeatureError(f"the group {group!r} is given twice, in two Unicode forms")
            found[group] = kept_value(group, value)
    except FeatureError as error:
        raise DataError(f"dataset {dataset_name(dataset)!r}: {error}") from None
    return found


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
        try:
            files = find_files(pattern, folder)
        except DataError as error:
            raise DataError(f"dataset {dataset_name(dataset)!r}: {error}") from None
        for file in files:
            yield from read_file(file.path)


def _from_hub(
    dataset: DatasetSettings, folder: Path, split: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("a dataset from a hub", "transformers", error) from None
    given = os.path.expanduser(str(dataset.hub))
    local = folder / given
    name = str(local) if local.exists() else given
    try:
        loaded = datasets.load_dataset(name, name=dataset.subset, split=split)
    except Exception as error:  # the hub, the network, a script or the files: all end here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"dataset {name!r} (split {split!r}) cannot be loaded: {reason}") from error
    for number, record in enumerate(loaded):
        yield f"{name} [{split}] row {number}", record


def _row(
    record: Mapping[str, Any],
    where: str,
    dataset: DatasetSettings,
    declared: Features,
    number: int,
    evaluation: bool,
) -> Row:
    features = dict(declared)
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
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(
                    f"{where}: column {column!r} holds half of a surrogate pair, which is no text: {shown(value, 60)}"
                ) from None
        return value
    if is_number(value) and (isinstance(value, int) or math.isfinite(value)):
        return str(value)
    raise DataError(f"{where}: column {column!r} must hold text, got {shown(value)}")


def _feature(value: Any, group: str, where: str) -> Any:
    try:
        if isinstance(value, str | list | Mapping):
            return kept_value(group, value)
        raise FeatureError(
            f"the {group} must be a name, a list of names or {{name: weight}}, got {shown(value)}"
        )
    except FeatureError as error:
        raise DataError(f"{where}: {error}") from None


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
