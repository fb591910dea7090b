"""Counts an arm's data and ranks before anything is trained: cells, held-out cells, ranks of matched LoRAs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flix.core.errors import SettingsError, listed
from flix.core.features.cells import Cell, HeldOut, cell_name, cell_of, features_of
from flix.core.features.names import Feature
from flix.core.features.registry import FeatureRegistry
from flix.data.files import find_files
from flix.study.reading import Raw
from flix.study.settings import LoraSettings
from flix.training.data import Data, read_data
from flix.training.models import build_config
from flix.training.settings import Settings, listed_of

CELL = "cell"
LORA = "lora"


@dataclass(frozen=True)
class Counted:
    """An arm's data and ranks.

    Attributes:
        registry: its features.
        ranks: the rank of each feature.
        trained: the cells that it trains on.
        cells: all cells.
        files: names, SHA-256 and the like of the files that are read.
        known: the registry, if it has every feature of every cell; None where unknown ones are allowed.
    """

    registry: FeatureRegistry
    ranks: Mapping[Feature, int]
    trained: Sequence[Cell]
    cells: Sequence[Cell]
    files: list[dict[str, Any]]
    known: FeatureRegistry | None

    @cached_property
    def active(self) -> int:
        """The largest rank that a row of any trained cell activates."""
        return max(
            sum(self.ranks[f] for f in features_of(cell, self.registry)) for cell in self.trained
        )

    @property
    def total(self) -> int:
        """The ranks of all features together."""
        return sum(self.ranks.values())

    @property
    def by_group(self) -> dict[str, Any]:
        """The rank of each group, or of each feature if they differ in a group. Groups without rank are left out."""
        found: dict[str, Any] = {}
        for group in self.registry.groups:
            mine = {name: self.ranks[group, name] for name in self.registry.names(group)}
            if any(mine.values()):
                found[group] = mine if len({*mine.values()}) > 1 else next(iter(mine.values()))
        return found


class Counting:
    """Reads the data that settings name, each only once, and applies their rank rules. Loads no framework."""

    def __init__(self) -> None:
        self.read: dict[str, Data] = {}

    def __call__(self, settings: Settings) -> Counted:
        """Count the data and the ranks of some settings.

        Raises:
            FlixError: a mistake in settings or data.
        """
        said = settings.to_dict()
        key = json.dumps({name: said[name] for name in _OF_DATA}, sort_keys=True)
        if key not in self.read:
            self.read[key] = read_data(settings)
        data = self.read[key]
        config = build_config(settings, data)
        cells = [cell for _, cell, _ in data.mixture.all_cells()]
        ranks = {feature: int(config.ranks[feature]) for feature in config.registry.live}  # type: ignore[index]
        known = config.registry if settings.unknown == "error" else None
        trained = data.mixture.trained_cells()
        return Counted(config.registry, ranks, trained, cells, data.files, known)


_OF_DATA = ("kind", "datasets", "held_out", "registry", "implies", "unknown", "temperature", "cap", "seed")  # fmt: skip


def check_held_out(counted: Counted, where: str, held: Mapping[str, HeldOut]) -> None:
    """Refuse an arm that trains on a cell that the study holds out.

    Args:
        counted: the arm's data.
        where: the arm, for the message.
        held: the held-out cells, by what they are for.

    Raises:
        SettingsError: it trains on such cells; the message names them.
    """
    for what, cells in held.items():
        matched = cells.among(counted.trained, counted.known).any(axis=0)
        wrong = [cell_name(counted.trained[i]) for i in np.flatnonzero(matched).tolist()]
        if wrong:
            raise SettingsError(
                f"{where} trains on {listed(wrong)}, held out for {what}; no arm may train on such cells, in any phase: "
                "add them to held_out: of the common settings"
            )


def check_apart(counted: Iterable[Counted], choosing: HeldOut, last_word: HeldOut) -> None:
    """Refuse cells that are held out both for choosing and for the last word.

    Raises:
        SettingsError: there are such cells; the message names them.
    """
    both: dict[str, None] = {}
    for one in counted:
        first, second = (h.among(one.cells, one.known).any(axis=0) for h in (choosing, last_word))
        both |= {cell_name(one.cells[i]): None for i in np.flatnonzero(first & second).tolist()}
    if both:
        raise SettingsError(
            f"held_out: {listed(both)} {'is' if len(both) == 1 else 'are'} both for choosing and for the last word; "
            "say which is which with held_out: {choosing: [...], last_word: [...]}"
        )


def as_lora(raw: Raw, lora: LoraSettings, own: Counted, reference: Counted | None) -> Raw:
    """The settings of an arm that is a LoRA: its ranks, without feature dropout and weights of unseen cells.

    Args:
        raw: the common settings.
        lora: which LoRA is wanted.
        own: the data of the common settings.
        reference: the arm with which its ranks are matched; None if it has a rank of its own.
    """
    found = {**raw, "feature_dropout": None}
    evaluation = {k: v for k, v in (raw.get("evaluation") or {}).items() if k != "unseen_group_weights"}  # fmt: skip
    found["evaluation"] = evaluation
    zero: dict[str, Any] = dict.fromkeys(own.registry.groups, 0)
    if lora.each is None:
        found = _everywhere(found, own)
        found["ranks"] = {"rule": "explicit", "ranks": {**zero, LORA: _rank(lora, reference, 1)}}
        return found
    if lora.each not in own.registry.groups:
        raise SettingsError(
            f"lora.each: there is no group {lora.each!r}; the groups are: {listed(own.registry.groups)}, and cell"
        )
    trained = {name for cell in own.trained for group, name in features_of(cell, own.registry) if group == lora.each}  # fmt: skip
    names = own.registry.names(lora.each)
    rank = _rank(lora, reference, len(trained))
    found["ranks"] = {
        "rule": "explicit",
        "ranks": {**zero, lora.each: {name: rank if name in trained else 0 for name in names}},
    }
    return found


def by_cell(raw: Raw) -> Raw:
    """Settings whose rows have one more feature, ``cell=...``, and one data set for each cell.

    Raises:
        SettingsError: the names of the files do not tell the cells of their rows.
    """
    datasets: list[Any] = []
    held = list(raw.get("held_out") or [])
    for dataset in raw["datasets"]:
        if dataset.get("hub") or dataset.get("feature_columns") or dataset.get("stream"):
            raise SettingsError(
                f"lora.each: cell: one LoRA for each cell needs files whose names tell their cells; the data set with {dataset.get('files') or dataset.get('hub')!r} "
                "has another form"
            )
        found: dict[str, dict[str, Any]] = {}
        for half in ("files", "eval_files"):
            for file in (
                f for name in listed_of(dataset.get(half)) for f in find_files(name, Path())
            ):
                features = {**(dataset.get("features") or {}), **file.features}
                if CELL in features:
                    raise SettingsError(
                        f"lora.each: cell: the data has a group {CELL!r} already; rename it"
                    )
                name = "/".join("+".join(names) for _, names in cell_of(features))
                one = found.setdefault(name, {"features": {**features, CELL: name}})
                one.setdefault(half, []).append(str(file.path))
        kept = {
            k: v for k, v in dataset.items() if k not in ("files", "eval_files", "features", "name")
        }
        for name, one in found.items():
            if "files" not in one:  # of evaluation alone
                one["files"] = one["eval_files"]
                held.append({CELL: name})
            datasets.append({**kept, **one})
    return {**raw, "datasets": datasets, "held_out": held}


def _rank(lora: LoraSettings, reference: Counted | None, several: int) -> int:
    if lora.rank is not None:
        return lora.rank
    assert reference is not None
    return reference.active if lora.equal_compute else max(1, round(reference.total / several))


def _everywhere(raw: Raw, own: Counted) -> Raw:
    """Settings in which every row has one more feature, ``lora=all``."""
    if LORA in own.registry.groups:
        raise SettingsError(
            f"lora: the data has a group {LORA!r} already, a name that the LoRA needs for its own; rename the group in the data"
        )
    named = [{group for group, _ in cell} for cell in own.cells]
    common = set.intersection(*named) if named else set()
    if not common:
        raise SettingsError(
            "lora: a LoRA for all rows needs a group that all rows name, and there is none"
        )
    group = "task" if "task" in common else sorted(common)[0]
    implies = dict(raw.get("implies") or {})
    implies[f"{group}=*"] = [*listed_of(implies.get(f"{group}=*")), f"{LORA}=all"]
    found = {**raw, "implies": implies}
    if raw.get("registry"):
        found["registry"] = {**raw["registry"], LORA: ["all"]}
    return found
