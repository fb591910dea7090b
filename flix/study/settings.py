"""The form of a study's configuration, as pydantic models; unknown keys are refused. See ``docs/study.md``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Union

from pydantic import Field, StrictBool, model_validator

from flix.core.errors import listed, near
from flix.core.strictfields import Count, Finite, Name, Number
from flix.study.evidence import NAMES
from flix.training.settings import Form

Seed = Annotated[int, Number, Field(ge=0, lt=2**32)]
Layers = Union[Name, dict[Name, Any], list[Union[Name, dict[Name, Any]]]]
"""Settings of ``flix train``, a file that holds them, or a list of both; later entries override earlier ones."""
Choices = dict[Name, Union[Annotated[list[Any], Field(min_length=1)], dict[Name, Any]]]
"""For each setting, the values to choose from; a mapping gives them names."""
Cells = list[Union[Name, dict[Name, Name]]]
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class LoraSettings(Form):
    """An arm that is one LoRA, or one for each feature of a group.

    Attributes:
        each: a group: each of its features gets a LoRA of its own; or ``cell``: each trained combination gets one.
            Default: one LoRA for all rows.
        equal_compute: the name of an arm; the rank is the one that a row of that arm activates.
        equal_parameters: the name of an arm; all ranks together are as many as those of all its features.
        rank: the rank itself.
    """

    each: Name | None = None
    equal_compute: Name | None = None
    equal_parameters: Name | None = None
    rank: Count | None = None

    @model_validator(mode="after")
    def _one_rank(self) -> LoraSettings:
        given = [self.equal_compute, self.equal_parameters, self.rank]
        if sum(value is not None for value in given) != 1:
            raise ValueError("needs one of equal_compute:, equal_parameters: and rank:")
        return self


class ArmSettings(Form):
    """One method of the comparison.

    Attributes:
        title: how people read the arm's name.
        settings: settings of ``flix train`` that override the common ones; mappings are merged key by key, but
            ``ranks`` is replaced as a whole.
        lora: turns the arm into a LoRA, whose ranks are computed.
        adapt: false for the base without training.
        leave_out: features; the arm does without the data sets whose rows all have one of them.
        choices: for each setting, the arm's own values, which replace the study's.
    """

    title: Name | None = None
    settings: dict[Name, Any] = Field(default_factory=dict)
    lora: LoraSettings | None = None
    adapt: StrictBool = True
    leave_out: Cells = Field(default_factory=list)
    choices: Choices = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_way(self) -> ArmSettings:
        if self.lora is not None and "ranks" in self.settings:
            raise ValueError("lora: computes the ranks; leave out settings.ranks")
        if not self.adapt and (self.lora is not None or self.choices):
            raise ValueError(
                "adapt: false is the base without training; leave out lora: and choices:"
            )
        return self


class ChoosingSettings(Form):
    """The first phase, which chooses each arm's learning rate and the like from one grid.

    Attributes:
        common: settings that all arms have in this phase; default: the study's.
        steps: how many steps its runs take; default: as many as the last runs.
        seed: the seed of its runs.
        choices: for each setting (``training.learning_rate``, or ``prompt`` for all data sets), the values to try.
        by: the score that decides: the mean over the ``seen`` cells, the mean over the held-out cells for
            ``choosing``, or the mean of these two, ``both``.
    """

    common: Layers | None = None
    steps: Count | None = None
    seed: Seed = 0
    choices: Choices = Field(default_factory=dict)
    by: Literal["seen", "choosing", "both"] = "both"


class HeldOutSettings(Form):
    """Cells that no arm trains on: those on which choices are made, and those for the last word."""

    choosing: Cells = Field(default_factory=list)
    last_word: Cells = Field(default_factory=list)


class ClaimSettings(Form):
    """By how much an arm is claimed to be ahead of others.

    Attributes:
        arm: the arm.
        against: the other arms.
        cells: which cells: ``seen``, ``choosing``, ``last_word``, or ``zero_shot``, which means the same as
            ``last_word``.
        at_least: by how many points, at least.
    """

    arm: Name
    against: Annotated[list[Name], Field(min_length=1)]
    cells: Name
    at_least: Finite

    @model_validator(mode="after")
    def _known_cells(self) -> ClaimSettings:
        if self.cells not in NAMES:
            raise ValueError(
                f"cells: must be one of {listed(NAMES)}{near(self.cells, NAMES)}, got {self.cells!r}"
            )
        return self


class StudySettings(Form):
    """A study: arms and seeds under one budget.

    Attributes:
        output: the folder to write.
        seeds: how many seeds, counted from 0, or a list of seeds.
        common: settings that all arms have.
        held_out: cells never trained on; default: those that the settings of the two phases hold out.
        arms: the arms, by name.
        choosing: the first phase; default: there is none.
        weights: for each group, factors for its features in held-out cells. They are chosen without more training;
            ``searched`` weights are evaluated too, but never chosen.
        claims: what the study should show.
        small: what changes in the small form of the study; here ``arms`` is a list of names.
    """

    output: Name
    seeds: Union[Annotated[int, Number, Field(ge=1, le=1000)], Annotated[list[Seed], Field(min_length=1)]] = 1  # fmt: skip
    common: Layers
    held_out: HeldOutSettings | None = None
    arms: Annotated[dict[Name, ArmSettings], Field(min_length=1)]
    choosing: ChoosingSettings | None = None
    weights: dict[Name, Annotated[list[Union[Finite, Literal["searched"]]], Field(min_length=1)]] = Field(default_factory=dict)  # fmt: skip
    claims: list[ClaimSettings] = Field(default_factory=list)
    small: dict[Name, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _arms_exist(self) -> StudySettings:
        for name, arm in self.arms.items():
            if not PLAIN.fullmatch(name):
                raise ValueError(
                    f"arms: an arm's name is also a folder's: it may hold letters, digits, '-', '_' and '.', got {name!r}"
                )
            for other in (arm.lora.equal_compute, arm.lora.equal_parameters) if arm.lora else ():
                if other is not None:
                    self._need_arm(other, f"arms.{name}.lora")
                    if self.arms[other].lora is not None or not self.arms[other].adapt:
                        raise ValueError(
                            f"arms.{name}.lora: {other!r} has no ranks of its own to be equal to"
                        )
        for number, claim in enumerate(self.claims):
            for other in (claim.arm, *claim.against):
                self._need_arm(other, f"claims[{number}]")
        if self.weights and self.choosing is None:
            raise ValueError("weights: needs choosing:, because weights are chosen on its cells")
        if len(set(self.all_seeds)) < len(self.all_seeds):
            raise ValueError("seeds: a seed is given twice")
        return self

    def _need_arm(self, name: str, where: str) -> None:
        if name not in self.arms:
            raise ValueError(
                f"{where}: there is no arm {name!r}{near(name, self.arms)}; the arms are: {listed(self.arms, 40)}"
            )

    @property
    def all_seeds(self) -> list[int]:
        """The seeds, one by one."""
        return list(self.seeds) if isinstance(self.seeds, list) else list(range(self.seeds))
