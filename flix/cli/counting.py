"""What ``flix plan`` shows of a training configuration where the packages that read data and models are not installed.

Rows are counted with the standard library, and layers read from the names and shapes in a checkpoint's files. Both are
what training finds, too; where that is not sure, nothing is guessed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flix.core.adapter.adapter import LayerShape
from flix.core.config.config import FlixConfig
from flix.core.config.targets import LayerInfo, Patterns, is_head, select
from flix.core.errors import AdapterError, ConfigError, FeatureError, TargetError, listed
from flix.core.features.cells import Cell, HeldOut, MixtureError, cell_name, cell_of, features_of
from flix.core.features.names import Feature
from flix.core.features.registry import FeatureRegistry
from flix.core.strictjson import parsed
from flix.data.census import registry_of
from flix.data.errors import DataError
from flix.data.files import Found, read_file
from flix.data.places import files_of

if TYPE_CHECKING:
    from flix.training.settings import DatasetSettings, Settings

_LONGEST_HEADER = 100_000_000
_EMBEDDINGS = (
    "shared", "embed", "embeddings", "embed_tokens", "embed_positions", "wte", "wpe", "word_embeddings",
    "position_embeddings", "token_type_embeddings", "relative_attention_bias",
)  # fmt: skip


NEEDED = ("datasets", "torch", "transformers")
"""What reads data and builds models; ``flix plan`` counts where one is not installed."""


def lacking() -> list[str]:
    """Which of the needed packages are not installed."""
    return [n for n in NEEDED if (n in sys.modules and sys.modules[n] is None) or not _found(n)]


def _found(name: str) -> bool:
    return name in sys.modules or find_spec(name) is not None


def planned(
    settings: Settings, explain: bool
) -> tuple[FlixConfig, dict[str, LayerShape], list[Any], list[str]]:
    """The adapter's configuration, the layers that are known, what trained rows activate, and notes.

    Args:
        settings: the configuration.
        explain: whether strategies are asked for, which go by which of a layer's sizes is the input's.

    Raises:
        FlixError: a mistake in the settings or the data, data that only a package reads, or ``explain``.
    """
    if explain:
        raise ConfigError(
            f"--explain needs the model itself, but {listed(lacking())} is not installed; "
            f"install it with: "
            'pip install "flix-peft[train]"'
        )
    from flix.data.display import idle_notes, trained_rows
    from flix.tasks.starting import features_before
    from flix.training.data import Data, implications, row_groups
    from flix.training.models import build_config

    groups, implies = row_groups(settings), implications(settings)
    mixture: Any = count(settings, groups, implies)
    data = Data(mixture, (), [], implies, tuple(groups))
    config = build_config(settings, data)
    notes = [f"{listed(lacking())} not installed: rows are counted and layers read from the checkpoint's names"]  # fmt: skip
    layers: dict[str, LayerShape] = {}
    kinds = {dataset.kind or settings.kind for dataset in settings.datasets}
    try:
        layers = checkpoint_layers(
            settings.base_folder / os.path.expanduser(settings.model),
            config.target_modules,
            config.exclude_modules,
            not kinds & {"seq2seq", "causal"},
        )
    except ConfigError as error:
        if isinstance(error, TargetError):
            raise
        notes.append(
            f"parameters and FLOPs are not known: {error}; to know them, install the extra: "
            'pip install "flix-peft[train]"'
        )
    return config, layers, trained_rows(mixture), [*notes, *idle_notes(mixture, config.registry, features_before(settings.start_from, settings.base_folder))]  # fmt: skip


class Counted:
    """The cells of a configuration's training rows: what rank rules and plans ask a mixture for.

    Args:
        cells: rows by cell, in the order of the data sets; of evaluation alone: 0.
        registry: the features.
        held_out: cells that are never trained on.

    Raises:
        MixtureError: an entry of ``held_out`` that matches no cell, or nothing is left to train on.
    """

    opaque = ()  # nothing streams here: all rows are counted

    def __init__(
        self,
        cells: Mapping[Cell, int],
        registry: FeatureRegistry,
        held_out: Sequence[Any],
    ) -> None:
        self._cells, self._registry = dict(cells), registry
        excluded, keys = HeldOut(held_out), list(cells)
        excluded.check_matched(keys, registry)
        held = excluded.among(keys, registry)
        self._trained = [c for i, c in enumerate(keys) if not held[:, i].any() and cells[c]]
        if not self._trained:
            raise MixtureError("nothing is left to train on: there are no rows, or all are held out")  # fmt: skip

    def registry(self) -> FeatureRegistry:
        """The features."""
        return self._registry

    def feature_sizes(self) -> dict[Feature, int]:
        """The training rows of every feature, implied ones counted."""
        totals = dict.fromkeys(self._registry.live, 0)
        for cell in self._trained:
            for feature in features_of(cell, self._registry):
                totals[feature] += self._cells[cell]
        return totals

    def trained_cells(self) -> list[Cell]:
        """The cells that are trained on."""
        return list(self._trained)


def count(settings: Settings, groups: Sequence[str], implies: Mapping[Feature, Sequence[Feature]]) -> Counted:  # fmt: skip
    """Count a configuration's training rows by cell.

    Raises:
        ConfigError: a data set of a hub, which only its package reads.
        DataError, FeatureError: files, rows or features that are wrong.
        MixtureError: as :class:`Counted`, or a cell with too few rows to hold some back.
    """
    cells: dict[Cell, int] = {}
    halves = [_cells(dataset, settings.base_folder, groups) for dataset in settings.datasets]
    for training, _ in halves:
        cells.update(dict.fromkeys(training, 0))
    for _, evaluation in halves:
        cells.update({cell: 0 for cell in evaluation if cell not in cells})
    registry = registry_of(list(cells), groups, implies or None)
    if settings.registry is not None:
        registry = FeatureRegistry(settings.registry, implies)
    excluded = HeldOut(settings.held_out).among(list(cells), registry)
    held = {cell for i, cell in enumerate(cells) if excluded[:, i].any()}
    for dataset, (training, _) in zip(settings.datasets, halves, strict=True):
        for cell, rows in training.items():
            back = 0 if cell in held else dataset.eval_rows
            if back and rows <= back:
                raise MixtureError(
                    f"{cell_name(cell)} has {rows} rows, too few to hold back eval_rows={back} and train on the rest"
                )
            cells[cell] += rows - back
    return Counted(cells, registry, settings.held_out)


def _cells(dataset: DatasetSettings, folder: Path, groups: Sequence[str]) -> tuple[dict[Cell, int], dict[Cell, int]]:  # fmt: skip
    """The rows of a data set by cell: for training, and for evaluation."""
    if dataset.files is None:
        raise ConfigError(
            f"the data set {dataset.hub!r} is read with the package datasets, which is not installed; install it with: "
            'pip install "flix-peft[train]"'
        )
    halves: list[dict[Cell, int]] = []
    for patterns in (dataset.files, dataset.eval_files or []):
        counts, left = dict[Cell, int](), dataset.limit
        names = [patterns] if isinstance(patterns, str) else patterns
        for found in files_of(names, folder, (), dataset.name or listed(names)):
            for where, record in read_file(found.path):
                if left is not None and (left := left - 1) < 0:
                    break
                cell = _cell(dataset, found, record, where, groups)
                counts[cell] = counts.get(cell, 0) + 1
        halves.append(counts)
    return halves[0], halves[1]


def _cell(dataset: DatasetSettings, file: Found, record: Mapping[str, Any], where: str, groups: Sequence[str]) -> Cell:  # fmt: skip
    row: dict[str, Any] = {**dataset.features, **file.features}
    for group, column in dataset.feature_columns.items():
        if column not in record:
            raise DataError(f"{where}: no column {column!r}, which names the {group}")
        row[group] = record[column]
    try:
        return cell_of(row, groups)
    except FeatureError as error:
        raise DataError(f"{where}: {error}") from None


def checkpoint_layers(
    folder: Path, targets: Patterns, excluded: Patterns, headed: bool
) -> dict[str, LayerShape]:
    """The layers of a checkpoint that would be adapted, by the names and shapes in its safetensors files.

    A matrix is taken for a linear layer, unless it is called as embeddings are. Which of its axes is the input is not
    told everywhere; parameters and FLOPs are the same either way.

    Args:
        folder: the model's.
        targets, excluded: as for ``FlixConfig``.
        headed: whether heads of flix's own go onto the encoder: its pooler and head are then left out.

    Raises:
        ConfigError: no such folder, no safetensors in it, a damaged file, or weights that are packed, or of experts.
        TargetError: patterns that match nothing.
    """
    layers = []
    for name, (dtype, shape) in _tensors(folder).items():
        path = name.removesuffix(".weight")
        if len(shape) > 2 and "conv" not in path:
            raise ConfigError(f"{name!r} of {str(folder)!r} has {len(shape)} axes, as experts have")
        if len(shape) != 2 or path == name:
            continue
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise ConfigError(f"{name!r} of {str(folder)!r} is packed ({dtype})")
        parts = path.split(".")
        if headed and ("pooler" in parts or is_head(path)):
            continue
        kind = "embedding" if parts[-1] in _EMBEDDINGS else "linear"
        layers.append(LayerInfo(path, kind, shape[1], shape[0], head=is_head(path)))
    return {info.path: LayerShape.told(info) for info in select(layers, targets, excluded)}


def _tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtypes and shapes by name, from all files of a checkpoint."""
    if not folder.is_dir():
        raise ConfigError(f"the model {str(folder)!r} is not a local folder")
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():  # it counts, as in transformers: the index may be of an older model
        files = [whole]
    elif index.is_file():
        files = [
            folder / name
            for name in sorted(set(_read(index, index.read_bytes())["weight_map"].values()))
        ]
    else:
        raise ConfigError(f"the model's folder {str(folder)!r} holds no model.safetensors")
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if not 0 < size <= min(_LONGEST_HEADER, os.path.getsize(file)):
                raise ConfigError(f"{str(file)!r} is damaged: its header has {size} bytes")
            header = _read(file, opened.read(size))
        for name, said in header.items():
            if name != "__metadata__":
                try:
                    found[name] = (str(said["dtype"]), [int(n) for n in said["shape"]])
                except (KeyError, TypeError, ValueError):
                    raise ConfigError(f"{str(file)!r} is damaged: {name!r} has no shape") from None
    return found


def _read(file: Path, text: bytes) -> Any:
    """An object out of a checkpoint's file."""
    try:
        found = parsed(text, repr(str(file)))
    except AdapterError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{str(file)!r} is damaged: it holds no object")
    return found
