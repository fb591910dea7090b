"""From settings to a :class:`flix.data.Mixture` and what its rows are examples of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flix.core.errors import FeatureError, listed
from flix.core.features.names import Feature, normal_group, written
from flix.core.features.registry import FeatureRegistry
from flix.data import Mixture, Source
from flix.data.apart import Half, check_apart
from flix.data.columns import check_group, kept_value
from flix.data.loading import (
    Reading,
    load_files,
    load_hub,
    stream_files,
    stream_hub,
    with_features,
)
from flix.data.places import described, described_split, files_of, hub_place
from flix.tasks.columns import TASK, names_in
from flix.tasks.specs import FORMS, LABELS, Gathered, Spec
from flix.training.errors import DataError, SettingsError
from flix.training.settings import DatasetSettings, Settings, listed_of


@dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        mixture: decides what is trained on, what is held out, and what is evaluated on.
        specs: the tasks; a row's column ``flix_task`` is a place in them.
        files: of each data set its name, its rows, and its files with name, bytes and digest.
        implies: what features bring along.
        groups: those that rows name.
    """

    mixture: Mixture
    specs: tuple[Spec, ...]
    files: list[dict[str, Any]]
    implies: Mapping[Feature, list[Feature]]
    groups: tuple[str, ...]


def read_data(settings: Settings, registry: FeatureRegistry | None = None) -> Data:
    """Read all data sets and mix them.

    Args:
        settings: the configuration.
        registry: the features of an adapter that is to be evaluated; default: the configuration's.

    Raises:
        FlixError: files or rows that are wrong, features that do not exist, nothing to train on.
    """
    groups = row_groups(settings)
    gathered, files = Gathered(), list[dict[str, Any]]()
    halves: tuple[list[Half], list[Half]] = ([], [])
    names: set[str] = set()
    for dataset in settings.datasets:
        name = _unique(dataset_name(dataset), names)
        read = _kind(settings, dataset), _columns(settings, dataset), dataset.features, dataset.feature_columns  # fmt: skip
        for half in (False, True):
            if dataset.stream and not half:
                source = _stream(settings, dataset, name, groups, gathered, files)
            else:
                loaded = _loaded(settings, dataset, name, half, gathered, files)
                if loaded is None:
                    continue
                absent = dict.fromkeys(g for g in groups if g not in loaded.column_names)
                rows = 0 if half else dataset.eval_rows
                source = Source(loaded, absent if len(loaded) else {}, name, eval_rows=rows)
            halves[half].append(Half(name, read, files[-1]["files"], source))
    given = registry or (FeatureRegistry(settings.registry) if settings.registry else None)
    mixture = Mixture(
        [half.source for half in halves[False]],
        evaluation=[half.source for half in halves[True]],
        columns=groups,
        temperature=settings.temperature,
        cap=settings.cap,
        held_out=settings.held_out,
        seed=settings.seed,
        **_known(settings, given, registry is not None),
    )
    if registry is None:  # an adapter may be evaluated on whatever rows there are
        check_apart(*halves, mixture)
    return Data(mixture, gathered.specs(), files, implications(settings), tuple(groups))


def _known(settings: Settings, given: FeatureRegistry | None, adapter: bool) -> dict[str, Any]:
    """What the mixture knows of features. Where unknown ones are allowed, it goes by what occurs."""
    implies = implications(settings)
    if given is None or settings.unknown != "error":
        return {"implies": implies}
    if adapter:
        return {"registry": given}
    names = {group: list(given.names(group)) for group in given.groups}
    return {"registry": FeatureRegistry(names, implies)}


def implications(settings: Settings) -> dict[Feature, list[Feature]]:
    """What features bring along.

    Raises:
        SettingsError: ``implies`` is ill-formed.
    """
    found: dict[Feature, list[Feature]] = {}
    for given, targets in settings.implies.items():
        source = _pair(given)
        if source in found:
            raise SettingsError(f"implies: {written(source)} is given twice")
        found[source] = [_pair(target) for target in listed_of(targets)]
    return found


def _pair(text: str) -> Feature:
    # With ":", as it was written before, where there is no "=".
    group, sign, name = text.partition("=" if "=" in text else ":")
    if not sign or not group.strip() or not name.strip():
        raise SettingsError(f"implies: features are written as group=name, got {text!r}")
    return group.strip(), name.strip()


def row_groups(settings: Settings) -> list[str]:
    """All groups that rows name, in the order of the data sets."""
    found: dict[str, None] = {}
    for dataset in settings.datasets:
        for group in (*dataset.features, *dataset.file_groups, *dataset.feature_columns):
            try:
                found[normal_group(group)] = None
                check_group(normal_group(group))
            except FeatureError as error:
                raise DataError(f"dataset {dataset_name(dataset)!r}: {error}") from None
    return list(found)


def dataset_name(dataset: DatasetSettings) -> str:
    """What a data set is called."""
    if dataset.name or dataset.hub:
        part = f"/{dataset.subset}" if dataset.subset else ""
        return str(dataset.name or f"{dataset.hub}{part}")
    return listed(listed_of(dataset.files))


def _unique(name: str, names: set[str]) -> str:
    found, number = name, 1
    while found in names:
        number += 1
        found = f"{name} ({number})"
    names.add(found)
    return found


def _loaded(
    settings: Settings,
    dataset: DatasetSettings,
    name: str,
    half: bool,
    gathered: Gathered,
    files: list[Any],
) -> Any:
    """One half of a data set, with the columns of features and tasks; None if there is no such half."""
    reading = _reading(settings, dataset, name)
    split = dataset.eval_split if half else dataset.split
    patterns = listed_of(dataset.eval_files if half else dataset.files)
    if dataset.hub is not None and split is not None:
        where = hub_place(dataset.hub, settings.base_folder)
        loaded, state = load_hub(where, dataset.subset, split, reading)
        said = [described_split(dataset.hub, dataset.subset, split, state)]
    elif patterns:
        found = files_of(patterns, settings.base_folder, dataset.file_groups, name)
        loaded = load_files(found, reading)
        said = [described(file) for file in found]
    else:
        return None
    files.append({"name": name, "files": said, "rows": len(loaded), "evaluation": half})
    loaded, named = with_features(loaded)
    if not len(loaded):
        return loaded
    return gathered.with_tasks(
        loaded,
        name,
        half,
        named,
        kind=_kind(settings, dataset),
        columns=_columns(settings, dataset),
        prompt=dataset.prompt,
        labels=dataset.labels,
        features=reading.features,
        feature_columns=dataset.feature_columns,
    )


def _stream(
    settings: Settings, dataset: DatasetSettings, name: str, groups: Sequence[str], gathered: Gathered, files: list[Any]
) -> Source:  # fmt: skip
    """The training rows of a data set that is streamed."""
    reading = _reading(settings, dataset, name)
    kind, columns = _kind(settings, dataset), _columns(settings, dataset)
    if kind in LABELS and dataset.labels is None:
        raise DataError(
            f"dataset {name!r}: the labels of a stream are not known before it is read; give labels:"
        )
    task = reading.features.get("task", name)
    spec = {"name": task if isinstance(task, str) else "+".join(task), "kind": kind, "columns": columns, "prompt": dataset.prompt}  # fmt: skip
    number = gathered.declared({**spec, "labels": dataset.labels, "features": reading.features, "feature_columns": dataset.feature_columns})  # fmt: skip
    size = dataset.rows
    if dataset.hub is not None:
        where = hub_place(dataset.hub, settings.base_folder)
        made, rows, state = stream_hub(where, dataset.subset, dataset.split, reading, **{TASK: number})  # fmt: skip
        size, said = (
            size or rows,
            [described_split(dataset.hub, dataset.subset, dataset.split, state)],
        )
    else:
        found = files_of(listed_of(dataset.files), settings.base_folder, dataset.file_groups, name)
        made = stream_files(found, reading, **{TASK: number})
        said = [described(file, streamed=True) for file in found]
    files.append({"name": name, "files": said, "rows": size, "evaluation": False})
    told = {*reading.features, *dataset.feature_columns}
    absent = dict.fromkeys(group for group in groups if group not in told)
    return Source(made, {**reading.features, **absent}, name, size)


def _reading(settings: Settings, dataset: DatasetSettings, name: str) -> Reading:
    """What is kept of the rows of a data set."""
    features: dict[str, Any] = {}
    try:
        for given, value in dataset.features.items():
            features[normal_group(given)] = kept_value(given, value)
    except FeatureError as error:
        raise DataError(f"dataset {name!r}: {error}") from None
    forms = FORMS[_kind(settings, dataset)]
    columns = {c: forms.get(w, "messages") for w, c in _columns(settings, dataset).items()}
    groups = {*features, *dataset.file_groups, *dataset.feature_columns}
    for asked in names_in(dataset.prompt or ""):
        if asked not in groups:
            columns.setdefault(asked, "shown")
    if own := [column for column in columns if column == "input_ids" or column.startswith("flix_")]:
        raise DataError(
            f"dataset {name!r}: {own[0]!r} is a name of flix's own columns; rename the column of the rows"
        )
    if clash := [column for column in columns if column in groups]:
        raise DataError(
            f"dataset {name!r}: {clash[0]!r} is a column of the rows and a group of features; rename one of the two"
        )
    return Reading(columns, features, dataset.feature_columns, dataset.limit)


def _columns(settings: Settings, dataset: DatasetSettings) -> dict[str, str]:
    """The columns that a data set's task reads, by what they hold."""
    if dataset.messages is not None:
        return {"messages": dataset.messages}
    return {what: getattr(dataset, what) for what in FORMS[_kind(settings, dataset)]}


def _kind(settings: Settings, dataset: DatasetSettings) -> str:
    return dataset.kind or settings.kind or ""
