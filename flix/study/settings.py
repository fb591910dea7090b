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
"""Settings of ``flix train``, or a file that holds them, or several, each over the one before."""
Choices = dict[Name, Union[Annotated[list[Any], Field(min_length=1)], dict[Name, Any]]]
"""By setting, the values to choose from; a mapping names them."""
Cells = list[Union[Name, dict[Name, Name]]]
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class LoraSettings(Form):
    """An arm that is one LoRA, or one for each feature of a group.

    Attributes:
        each: a group, each of whose features gets a LoRA; or ``cell``, one for each trained combination; default: one
            LoRA that every row has.
        equal_compute: an arm; the rank is what a row of it activates.
        equal_parameters: an arm; the ranks together are those of all its features.
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
        title: for people.
        settings: of ``flix train``, over the common ones; a mapping is merged key by key, ``ranks`` replaced.
        lora: makes the arm a LoRA; its ranks are computed.
        adapt: false: the base as it is.
        leave_out: data sets that the arm lacks, by a feature that all their rows have.
        choices: its own values, by setting, in place of the study's.
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
            raise ValueError("adapt: false is the base as it is: without lora: and choices:")
        return self


class ChoosingSettings(Form):
    """The first phase, which chooses each arm's learning rate and the like from one grid.

    Attributes:
        common: settings that all arms have in this phase; default: the study's.
        steps: of its runs; default: as the last ones have.
        seed: of its runs.
        choices: by setting (``training.learning_rate``, or ``prompt`` of all data sets), the values.
        by: what the best has most of: the mean score of the ``seen`` cells, of the held-out cells for ``choosing``, or
            the mean of these two, ``both``.
    """

    common: Layers | None = None
    steps: Count | None = None
    seed: Seed = 0
    choices: Choices = Field(default_factory=dict)
    by: Literal["seen", "choosing", "both"] = "both"


class HeldOutSettings(Form):
    """Cells that no arm trains on: those that choices may be made by, and those for the last word."""

    choosing: Cells = Field(default_factory=list)
    last_word: Cells = Field(default_factory=list)


class ClaimSettings(Form):
    """What an arm is claimed to have over others.

    Attributes:
        arm: the arm.
        against: others.
        cells: which cells: ``seen``, ``choosing``, ``last_word`` or ``zero_shot``, which is the same.
        at_least: points.
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
        output: the folder that it writes.
        seeds: how many, from 0; or a list.
        common: settings that all arms have.
        held_out: cells never trained on; default: those that the settings of the phases hold out.
        arms: by name.
        choosing: the first phase; default: there is none.
        weights: by group, factors for its features in held-out cells, chosen without training anew; ``searched`` is
            evaluated beside them.
        claims: what is to be shown.
        small: what differs in the small form of the study; ``arms`` is then a list of names.
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
                    f"arms: an arm's name is that of a folder: letters, digits, '-', '_' and '.', got {name!r}"
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
            raise ValueError("weights: are chosen on the cells of choosing:, which is missing")
        if len(set(self.all_seeds)) < len(self.all_seeds):
            raise ValueError("seeds: one is given twice")
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
