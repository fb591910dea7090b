"""Turns a study's configuration into runs: what each trains, and where. Only :mod:`.counting` reads files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flix.core.errors import SettingsError
from flix.core.features.cells import HeldOut
from flix.study.counting import (
    CELL,
    Counted,
    as_lora,
    by_cell,
    check_apart,
    check_held_out,
)
from flix.study.reading import Raw, Study, cells_of, checked, over_settings, without
from flix.study.settings import PLAIN, ArmSettings, Choices
from flix.training.settings import Settings

CHOOSING, LAST = "choosing", "runs"
#: Settings that only the whole study may set, because all arms have one budget and the study names folders and seeds.
SHARED = (
    "output", "seed", "held_out", "training.steps", "training.batch_size", "training.gradient_accumulation",
    "evaluation.limit", "evaluation.samples", "evaluation.at_end",
)  # fmt: skip
#: Defaults of a study's runs: one thread each, and every row of the evaluation.
DEFAULTS: Raw = {"training": {"threads": 1}, "evaluation": {"limit": None, "left_out": False}}
ALL_ANSWERS = 10**9


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        phase: ``"choosing"`` or ``"runs"``.
        arm: its arm.
        seed: its seed.
        choice: for each setting that is chosen, the name of its value.
        folder: the folder that it writes.
        settings: its settings of ``flix train``.
        adapt: false for the base without training.
    """

    phase: str
    arm: str
    seed: int
    choice: Mapping[str, str]
    folder: Path
    settings: Settings
    adapt: bool = True

    @property
    def name(self) -> str:
        """The run's name, as people read it."""
        if self.phase == LAST:
            return f"{self.arm}, seed {self.seed}"
        return f"{self.arm}, {choice_name(self.choice)}"


@dataclass
class Plan:
    """Makes the runs of a study.

    Attributes:
        study: the configuration.
        count: reads the data that settings name; data that several arms share is read once.
    """

    study: Study
    count: Callable[[Settings], Counted]
    _counted: dict[str, Counted] = field(default_factory=dict, repr=False)
    _raw: dict[tuple[str, str], Raw] = field(default_factory=dict, repr=False)

    @property
    def arms(self) -> Mapping[str, ArmSettings]:
        """The arms."""
        return self.study.settings.arms

    def phases(self, arm: str) -> list[str]:
        """The phases in which an arm takes part."""
        chooses = self.study.choosing is not None and self.arms[arm].adapt
        return [*([CHOOSING] if chooses else []), LAST]

    def choices(self, arm: str) -> list[dict[str, Any]]:
        """Every combination of an arm's choices, as the name of a value for each setting."""
        grid = self.grid(arm)
        return [dict(zip(grid, names, strict=True)) for names in itertools.product(*grid.values())]

    def grid(self, arm: str) -> dict[str, dict[str, Any]]:
        """For each setting, the values from which an arm chooses, by name."""
        chosen = self.study.settings.choosing
        given: Choices = {**(chosen.choices if chosen else {}), **self.arms[arm].choices}
        for key in given:
            if key in SHARED:
                raise SettingsError(
                    f"{self.study.name}: choices: {key} is the same for all arms; set it in common:"
                )
        return {key: named(values) for key, values in given.items()}

    def values(self, arm: str, choice: Mapping[str, str]) -> dict[str, Any]:
        """The values that a choice names."""
        grid = self.grid(arm)
        return {key: grid[key][name] for key, name in choice.items()}

    def check(self) -> None:
        """Look for every mistake that can be found before anything is trained.

        Raises:
            FlixError: a mistake in the settings or the data of an arm, or an arm that trains on a held-out cell.
        """
        held = {"choosing": self.held_out(CHOOSING), "the last word": self.held_out(LAST)}
        counted = []
        for arm in self.arms:
            for phase in self.phases(arm):
                counted.append(self.counted(arm, phase))
                check_held_out(counted[-1], self._where(arm, phase), held)
                for choice in self.choices(arm) if phase == CHOOSING else ():
                    self.run(arm, phase, self.study.settings.all_seeds[0], choice)
        if self.study.choosing is not None:
            check_apart(counted, *held.values())

    def held_out(self, phase: str) -> HeldOut:
        """The cells that are held out for choosing, or for the last word."""
        said = self.study.settings.held_out
        if said is not None:
            which = "choosing" if phase == CHOOSING else "last_word"
            return cells_of(getattr(said, which), f"{self.study.name}: held_out.{which}")
        common = self.study.choosing if phase == CHOOSING else self.study.common
        choosing = self.study.settings.choosing
        own = phase == CHOOSING and choosing is not None and choosing.common is not None
        key = f"{self.study.name}: {'choosing.common' if own else 'common'}.held_out"
        return cells_of((common or {}).get("held_out") or [], key)

    def counted(self, arm: str, phase: str) -> Counted:
        """An arm's data and ranks."""
        settings = checked(self.raw(arm, phase), self._where(arm, phase))
        return self._count(settings)

    def _count(self, settings: Settings) -> Counted:
        said = {
            k: v
            for k, v in settings.to_dict().items()
            if k not in ("training", "evaluation", "output")
        }
        key = json.dumps(said, sort_keys=True)
        if key not in self._counted:
            self._counted[key] = self.count(settings)
        return self._counted[key]

    def _where(self, arm: str, phase: str) -> str:
        return f"{self.study.name}: arm {arm!r} in the phase {phase!r}"

    def raw(self, arm: str, phase: str) -> Raw:
        """An arm's settings in a phase, without seed, choice and folder."""
        if (arm, phase) not in self._raw:
            self._raw[arm, phase] = self._made(arm, phase)
        return self._raw[arm, phase]

    def _made(self, arm: str, phase: str) -> Raw:
        form, where = self.arms[arm], self._where(arm, phase)
        refuse_shared(form.settings, f"{self.study.name}: arms.{arm}.settings")
        found = over_settings(DEFAULTS, self._common(phase))
        found = over_settings(found, form.settings)
        try:
            found = without(found, form.leave_out, f"arms.{arm}.leave_out")
            if form.lora is not None:
                found = by_cell(found) if form.lora.each == CELL else found
                # Whatever ranks the common settings have: one of each feature, to see which there are. An adapter to
                # start from is a LoRA of the same kind, which the settings do not describe before they are one.
                plain = {**found, "ranks": 1, "start_from": None, "freeze_start": False}
                own = self._count(checked(plain, where))
                other = form.lora.equal_compute or form.lora.equal_parameters
                found = as_lora(found, form.lora, own, self.counted(other, phase) if other else None)  # fmt: skip
                # It drops the common settings' feature dropout and weights, but not the arm's own.
                mine: dict[str, Any] = {key: form.settings[key] for key in ("feature_dropout", "evaluation") if key in form.settings}  # fmt: skip
                found = over_settings(found, mine)
        except SettingsError as error:
            raise error if self.study.name in str(error) else SettingsError(f"{where}: {error}") from None  # fmt: skip
        return found

    def _common(self, phase: str) -> Raw:
        said = self.study.settings
        raw = dict((self.study.choosing if phase == CHOOSING else None) or self.study.common)
        if said.held_out is not None and "held_out" not in raw:
            raw["held_out"] = [*said.held_out.choosing, *said.held_out.last_word]
        training = dict(raw.get("training") or {})
        if phase == CHOOSING:
            last = (self.study.common.get("training") or {}).get("steps")
            steps = (said.choosing.steps if said.choosing else None) or last
            training.update({"steps": steps} if steps is not None else {})
        if "save_every" not in training and "best" not in training:
            steps = training.get("steps", 1000)
            training["save_every"] = math.ceil(steps / 10) if isinstance(steps, int) else 100
        return {**raw, "training": training}

    def run(
        self,
        arm: str,
        phase: str,
        seed: int,
        choice: Mapping[str, str],
        weights: Mapping[str, float] | None = None,
    ) -> Run:
        """A run.

        Args:
            arm, phase, seed: which.
            choice: by setting, the name of a value.
            weights: factors for groups in held-out cells.
        """
        raw, grid = self.raw(arm, phase), self.grid(arm)
        for key, name in choice.items():
            raw = with_choice(raw, key, grid[key][name])
        where = self._where(arm, phase)
        evaluation = dict(raw.get("evaluation") or {})
        if weights:
            evaluation["unseen_group_weights"] = {**(evaluation.get("unseen_group_weights") or {}), **weights}  # fmt: skip
        if phase == LAST:
            evaluation["samples"] = ALL_ANSWERS
        name = f"{arm}/{choice_name(choice)}" if phase == CHOOSING else f"{arm}-{seed}"
        folder = self.study.output / phase / name
        raw = {**raw, "evaluation": evaluation, "seed": seed, "output": str(folder)}
        settings = checked(raw, where)
        _refuse_drawn(settings, where)
        return Run(phase, arm, seed, choice, folder, settings, self.arms[arm].adapt)


def named(values: Any) -> dict[str, Any]:
    """Values by name: a mapping's own names, or numbers and words as they are, other values by their place."""
    if isinstance(values, Mapping):
        for name in values:
            if not PLAIN.fullmatch(name):
                raise SettingsError(
                    f"choices: the name of a value is also a folder's: it may hold letters, digits, '-', '_' and '.', got {name!r}"
                )
        return dict(values)
    found: dict[str, Any] = {}
    for place, value in enumerate(values, 1):
        text = f"{value:g}" if isinstance(value, float) else str(value)
        plain = isinstance(value, int | float | str) and PLAIN.fullmatch(text)
        found[text if plain and len(text) <= 40 and text not in found else f"number-{place}"] = (
            value
        )
    return found


def choice_name(choice: Mapping[str, str]) -> str:
    """A choice as its folder is called."""
    said = ",".join(f"{key.rpartition('.')[2]}={name}" for key, name in choice.items())
    return said or "as-it-is"


def with_choice(raw: Raw, key: str, value: Any) -> Raw:
    """Settings with one of them set; ``prompt`` is that of every data set."""
    if key == "prompt":
        return {**raw, "datasets": [{**d, "prompt": value} for d in raw["datasets"]]}
    over: Any = value
    for part in reversed(key.split(".")):
        over = {part: over}
    return over_settings(raw, over)


def refuse_shared(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings of an arm that all arms share.

    Raises:
        SettingsError: there is one.
    """
    for name in SHARED:
        value: Any = settings
        for part in name.split("."):
            value = value.get(part, _NOTHING) if isinstance(value, Mapping) else _NOTHING
        if value is not _NOTHING:
            raise SettingsError(
                f"{where}.{name}: is the same for all arms, got {json.dumps(value, default=str)}; set it in common:"
            )


_NOTHING = object()


def _refuse_drawn(settings: Settings, where: str) -> None:
    """Every seed is evaluated on the same rows.

    Raises:
        SettingsError: a data set draws its evaluation rows by the seed.
    """
    for number, dataset in enumerate(settings.datasets):
        if dataset.eval_rows:
            raise SettingsError(
                f"{where}: datasets[{number}].eval_rows draws other rows with every seed; give eval_files: or eval_split:"
            )
