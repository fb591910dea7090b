"""The rows of a run in their combinations of features: which are trained, which are evaluated, which held out.

A *cell* is a combination of named features, such as ``language=hau,task=ner``: what the mixture draws from, and what
results are reported by. Rows of held-out cells never enter the training set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flix.core import rng
from flix.core.errors import FlixError, listed
from flix.core.features import cells
from flix.core.features.encoding import Unknown
from flix.core.features.names import Feature, written
from flix.core.features.registry import FeatureRegistry
from flix.training.errors import DataError, SettingsError
from flix.training.settings import Settings
from flix.training.sources import Features, Row, dataset_name, names_of


@dataclass(frozen=True)
class Examples:
    """Rows of one purpose.

    Attributes:
        rows: the rows.
        cells: ``[n]``, the cell of each.
        combinations: ``[n]``, each one's place in :attr:`Corpus.combinations`.
    """

    rows: tuple[Row, ...]
    cells: NDArray[np.int64]
    combinations: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Examples:
        """Some of the rows, by mask or by place."""
        places = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Examples(
            tuple(self.rows[i] for i in places.tolist()),
            self.cells[places],
            self.combinations[places],
        )


@dataclass(frozen=True)
class Corpus:
    """All data of a run.

    Attributes:
        registry: the features.
        names: the cells' names.
        combinations: distinct features of rows, weights included; what routing is made of.
        trained: ``[cells]``, whether a cell has training rows.
        train: the training rows.
        evaluation: rows to evaluate on, of seen and held-out cells.
        held_back: how many evaluation rows were taken from training files.
        notes: what the user should know.
    """

    registry: FeatureRegistry
    names: tuple[str, ...]
    combinations: tuple[Features, ...]
    trained: NDArray[np.bool_]
    train: Examples
    evaluation: Examples
    held_back: int
    notes: tuple[str, ...]

    def trained_rows(self) -> list[Features]:
        """The distinct features of the training rows: the datasets that rank rules and plans ask for."""
        return [self.combinations[i] for i in np.unique(self.train.combinations).tolist()]

    def sizes(self) -> dict[Feature, int]:
        """The number of training rows of every feature, implied ones counted."""
        counts = np.bincount(self.train.combinations, minlength=len(self.combinations))
        totals = np.zeros(len(self.registry), np.int64)
        for row, count in zip(self.combinations, counts.tolist(), strict=True):
            if count:
                ids = self.registry.encode([row]).ids[0]
                totals[ids[ids >= 0]] += count
        return dict(zip(self.registry.features, totals.tolist(), strict=True))

    def cell_sizes(self) -> dict[str, int]:
        """The number of training rows of every trained cell."""
        counts = np.bincount(self.train.cells, minlength=len(self.names)).tolist()
        return {name: n for name, n in zip(self.names, counts, strict=True) if n}


def build_registry(settings: Settings, rows: Sequence[Row]) -> FeatureRegistry:
    """The registry that the configuration declares, or that its rows spell out.

    Derived: groups and names in the order of the datasets, then what ``implies`` adds.

    Raises:
        SettingsError: ``implies`` is ill-formed.
        FeatureError: what a registry refuses.
    """
    implies = _implies(settings)
    if settings.registry is not None:
        return FeatureRegistry(settings.registry, implies)
    groups: dict[str, dict[str, None]] = {}
    for row in rows:
        for group, value in row.features.items():
            groups.setdefault(group, {}).update(dict.fromkeys(names_of(value)))
    for targets in implies.values():
        for group, name in targets:
            groups.setdefault(group, {})[name] = None
    return FeatureRegistry({group: list(names) for group, names in groups.items()}, implies)


def _implies(settings: Settings) -> dict[Feature, list[Feature]]:
    found: dict[Feature, list[Feature]] = {}
    for given, targets in settings.implies.items():
        source = _pair(given)
        if source in found:
            raise SettingsError(f"implies: {written(source)} is given twice")
        found[source] = [_pair(t) for t in ([targets] if isinstance(targets, str) else targets)]
    return found


def _pair(text: str) -> Feature:
    # With ":", as it was written before, where there is no "=".
    group, sign, name = text.partition("=" if "=" in text else ":")
    if not sign or not group.strip() or not name.strip():
        raise SettingsError(f"implies: features are written as group=name, got {text!r}")
    return group.strip(), name.strip()


def build_corpus(
    settings: Settings,
    rows: Sequence[Row],
    registry: FeatureRegistry | None = None,
    unknown: Unknown = "error",
) -> Corpus:
    """Sort rows into training and evaluation.

    Args:
        settings: the configuration.
        rows: as :func:`flix.training.sources.read_rows` gives them.
        registry: the features; default: the configuration's.
        unknown: the policy for features that the registry does not have.

    Raises:
        DataError: no row to train on, or a row with a feature that does not exist.
        SettingsError: a held-out cell with a feature that does not exist.
    """
    if not rows:
        raise DataError("the datasets have no rows")
    registry = registry if registry is not None else build_registry(settings, rows)
    combinations, places = _distinct(rows)
    active = _active(registry, combinations, unknown, rows, places, settings)
    cell_keys = [cell_name(registry, row) for row in combinations]
    names = tuple(dict.fromkeys(cell_keys))
    number = {name: i for i, name in enumerate(names)}
    cell_of = np.array([number[name] for name in cell_keys], np.int64)
    held, notes = _held_out(settings, registry, active)
    everything = Examples(tuple(rows), cell_of[places], places)

    evaluation = np.array([row.evaluation for row in rows], bool)
    held_rows = held[places]
    # Training files of held-out cells serve as their evaluation rows where no evaluation file has the cell.
    covered = np.zeros(len(names), bool)
    covered[everything.cells[evaluation]] = True
    spare = held_rows & ~evaluation & ~covered[everything.cells]
    back = _held_back(settings, everything, ~evaluation & ~held_rows)
    train = ~evaluation & ~held_rows & ~back
    if not train.any():
        raise DataError("no rows are left to train on: all are held out or for evaluation")
    trained = np.zeros(len(names), bool)
    trained[everything.cells[train]] = True
    notes += _never_trained(registry, active, places[train])
    return Corpus(
        registry=registry,
        names=names,
        combinations=tuple(combinations),
        trained=trained,
        train=everything.select(train),
        evaluation=everything.select(evaluation | spare | back),
        held_back=int(back.sum()),
        notes=tuple(notes),
    )


def cell_name(registry: FeatureRegistry, features: Mapping[str, object]) -> str:
    """A combination in words, groups in the registry's order: ``language=hau,task=ner``."""
    order = {group: i for i, group in enumerate(registry.groups)}
    groups = sorted(features, key=lambda group: order.get(group, len(order)))
    return cells.cell_name(cells.cell_of(features, groups))


def _distinct(rows: Sequence[Row]) -> tuple[list[Features], NDArray[np.int64]]:
    found: dict[str, int] = {}
    combinations: list[Features] = []
    places = np.empty(len(rows), np.int64)
    for i, row in enumerate(rows):
        key = repr(sorted(row.features.items()))
        if key not in found:
            found[key] = len(combinations)
            combinations.append(row.features)
        places[i] = found[key]
    return combinations, places


def _active(
    registry: FeatureRegistry,
    combinations: Sequence[Features],
    unknown: Unknown,
    rows: Sequence[Row],
    places: NDArray[np.int64],
    settings: Settings,
) -> list[frozenset[int]]:
    """The ids that each combination activates; an unknown feature is reported with its dataset."""
    active = []
    for number, combination in enumerate(combinations):
        try:
            ids = registry.encode([combination], unknown).ids[0]
        except FlixError as error:
            row = rows[int(np.argmax(places == number))]
            name = dataset_name(settings.datasets[row.dataset])
            reason = str(error).removeprefix("row 0: ").partition(". To serve")[0]
            raise DataError(f"dataset {name!r}: {reason}") from None
        active.append(frozenset(ids[ids >= 0].tolist()))
    return active


def _held_out(
    settings: Settings, registry: FeatureRegistry, active: Sequence[frozenset[int]]
) -> tuple[NDArray[np.bool_], list[str]]:
    try:
        declared = cells.HeldOut(settings.held_out).cells
    except FlixError as error:
        raise SettingsError(str(error)) from None
    entries = []
    for number, cell in enumerate(declared):
        try:
            entries.append({registry.id(group, name) for group, name in cell.items()})
        except FlixError as error:
            raise SettingsError(f"held_out[{number}]: {error}") from None
    matched = cells.covering(entries, active)
    notes = [
        f"held_out[{number}] ({cell_name(registry, declared[number])}) matches no row"
        for number in np.flatnonzero(~matched.any(axis=1)).tolist()
    ]
    return np.asarray(matched.any(axis=0), bool), notes


def _never_trained(
    registry: FeatureRegistry, active: Sequence[frozenset[int]], trained: NDArray[np.int64]
) -> list[str]:
    """What to say of features that no training row activates."""
    acting = frozenset().union(*(active[i] for i in np.unique(trained).tolist()))
    idle = [written(f) for f in registry.live if registry.id(*f) not in acting]
    if not idle:
        return []
    are, they = ("is", "it") if len(idle) == 1 else ("are", "they")
    return [
        f"no training row activates {listed(idle)}, which {are} never trained: {they} will change nothing"
    ]


def _held_back(
    settings: Settings, examples: Examples, candidates: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Rows that ``eval_rows`` takes from training, by cell and dataset, drawn by the seed."""
    back = np.zeros(len(examples), bool)
    if not any(dataset.eval_rows for dataset in settings.datasets):
        return back
    owner = np.array([row.dataset for row in examples.rows], np.int64)
    draws = rng.uniform(
        rng.key("evaluation rows", settings.seed), np.arange(len(examples), dtype=np.int64)
    )
    for number, dataset in enumerate(settings.datasets):
        mine = candidates & (owner == number)
        for cell in np.unique(examples.cells[mine]).tolist() if dataset.eval_rows else ():
            places = np.flatnonzero(mine & (examples.cells == cell))
            if len(places) <= dataset.eval_rows:
                raise DataError(
                    f"dataset {dataset_name(dataset)!r}: a combination has {len(places)} rows, too few "
                    f"to hold back eval_rows: {dataset.eval_rows} and train on the rest"
                )
            back[places[np.argsort(draws[places], kind="stable")[: dataset.eval_rows]]] = True
    return back
