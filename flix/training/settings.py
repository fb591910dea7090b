"""The form of a training configuration, as pydantic models; unknown keys are refused.

Defaults are for a small run on one machine. What the file means is written in ``docs/cli.md``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from flix.core.checks import is_number, is_whole
from flix.core.strictfields import (
    Count,
    CountOr0,
    FeatureValue,
    Finite,
    Name,
    Names,
    NotNegative,
    Number,
    Positive,
    Rank,
    Rate,
)
from flix.data.files import groups_of

ByFeature = dict[Name, Union[Rank, dict[Name, Rank]]]
Kind = Literal["seq2seq", "causal", "classification", "regression", "tagging", "masked"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
Best = Literal["loss", "seen.loss", "held_out.loss", "score", "seen.score", "held_out.score"]
Alphas = Positive | dict[Name, Positive | dict[Name, Positive]]


class Form(BaseModel):
    """A part of the configuration: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def listed_of(names: str | Sequence[str] | None) -> list[str]:
    """One name, several or none, as a list."""
    return [names] if isinstance(names, str) else list(names or ())


class DatasetSettings(Form):
    """One source of rows.

    Attributes:
        name: what to call it; default: its files or hub name.
        kind: of its task; default: the configuration's.
        files: files or patterns with training rows, relative to the configuration file; ``{group}`` in a file's name
            stands for the feature of a group.
        hub: a dataset's hub name or folder, read with ``datasets.load_dataset``.
        subset, split: which part of it.
        features: features of every row, by group: a name, a list of names, or ``{name: weight}``.
        feature_columns: groups whose feature is read from a column of the row.
        source, target, tokens, tags, messages: columns, as the kind needs them.
        labels: of classification and tagging; default: those that occur.
        prompt: template of the input, with columns and groups in braces; default: the source alone.
        eval_files, eval_split: rows to evaluate on, never trained on.
        eval_rows: rows of every seen combination held back from training for evaluation.
        limit: use at most this many rows, the first.
        stream: read the training rows while training, without keeping them.
        rows: how many training rows a streamed data set has, which its share follows; a hub may say so itself.
    """

    name: Name | None = None
    kind: Kind | None = None
    files: Names | None = None
    hub: Name | None = None
    subset: Name | None = None
    split: Name = "train"
    features: dict[Name, FeatureValue] = {}
    feature_columns: dict[Name, Name] = {}
    source: Name = "source"
    target: Name = "target"
    tokens: Name = "tokens"
    tags: Name = "tags"
    messages: Name | None = None
    labels: Annotated[list[Name], Field(min_length=1)] | None = None
    prompt: Name | None = None
    eval_files: Names | None = None
    eval_split: Name | None = None
    eval_rows: CountOr0 = 0
    limit: Count | None = None
    stream: StrictBool = False
    rows: Count | None = None

    @model_validator(mode="after")
    def _streamed(self) -> DatasetSettings:
        if self.rows is not None and not self.stream:
            raise ValueError("rows: goes with stream: true; other data sets are counted")
        if self.stream and self.eval_rows:
            raise ValueError(
                "rows cannot be held back from a stream; leave out eval_rows: and give eval_files:"
            )
        if self.stream and self.files is not None and self.rows is None:
            raise ValueError(
                "files that are streamed are not counted; say how many rows they have: rows:"
            )
        if self.stream and (told := [*self.file_groups, *({"task"} & {*self.feature_columns})]):
            raise ValueError(f"for a stream, features: must say the {told[0]} of all rows")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> DatasetSettings:
        if (self.files is None) == (self.hub is None):
            raise ValueError("needs either files: or hub:, but not both")
        if self.hub is None and (self.subset or self.eval_split):
            raise ValueError("subset: and eval_split: go with hub:")
        named = [*self.features, *self.feature_columns, *self.file_groups]
        if not named:
            raise ValueError("needs features: or feature_columns:, or {group} in the files' names")
        if both := [group for group in named if named.count(group) > 1]:
            raise ValueError(
                f"group {both[0]!r} is in two of features:, feature_columns: and the files' names"
            )
        return self

    @property
    def file_groups(self) -> list[str]:
        """The groups whose features files' names tell."""
        return list(
            dict.fromkeys(g for pattern in listed_of(self.files) for g in groups_of(pattern))
        )


class UniformRanks(Form):
    """The same rank for every feature."""

    rule: Literal["uniform"]
    rank: Rank


class ExplicitRanks(Form):
    """Ranks by group, or by group and feature."""

    rule: Literal["explicit"]
    ranks: ByFeature


class ProportionalRanks(Form):
    """Ranks that follow the data and sum to a budget; sizes default to the training rows of each feature."""

    rule: Literal["proportional"]
    budget: Annotated[int, Number, Field(ge=1, le=10**7)]
    sizes: dict[Name, Union[CountOr0, dict[Name, CountOr0]]] | None = None
    temperature: Positive = 2.0
    minimum: Rank = 1
    maximum: Rank = 64


class ComputeMatchedRanks(Form):
    """The largest ranks with which no dataset costs more than a LoRA of this rank."""

    rule: Literal["compute_matched"]
    lora_rank: Count


class ParameterMatchedRanks(Form):
    """The parameters of a LoRA of this rank."""

    rule: Literal["parameter_matched"]
    lora_rank: Count


class ByGroupRanks(BaseModel):
    """One rank for all features of a group; the groups are the keys beside ``rule``."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Rank]
    rule: Literal["by_group"]


RULES = (UniformRanks, ByGroupRanks, ExplicitRanks, ProportionalRanks, ComputeMatchedRanks, ParameterMatchedRanks)  # fmt: skip
Ranks = Annotated[
    Union[
        UniformRanks, ByGroupRanks, ExplicitRanks, ProportionalRanks, ComputeMatchedRanks, ParameterMatchedRanks,
    ],
    Field(discriminator="rule"),
]  # fmt: skip


class DropoutSettings(Form):
    """Feature dropout in training."""

    p: Rate = 0.0
    per_group: dict[Name, Rate] = {}
    keep_one: StrictBool = False
    rescale: StrictBool = False


class TrainingSettings(Form):
    """How long and how to train.

    Attributes:
        steps: optimizer steps.
        batch_size: rows of a micro-batch.
        learning_rates: rates of their own, by group of features and for ``heads``.
        learning_rate, schedule, warmup_steps, warmup_ratio, weight_decay, max_grad_norm: the optimizer's, AdamW.
        gradient_accumulation: micro-batches of a step.
        similar_lengths: batches of rows of similar length, which saves padding; rows move by some steps at most.
        packing: tokens of the rows that a batch of a causal model is packed into, without padding between texts.
        eval_every: steps between evaluations of the loss; default: only at the end.
        save_every: steps between checkpoints; default: only at the end.
        keep_checkpoints: how many to keep.
        best: of which evaluation to keep the adapter, by a loss (the least) or a score (the greatest).
        patience: stop after so many evaluations that were not the best.
        report_to: trackers that are told of losses.
        log_every: steps between log lines; default: about 20 lines a run.
        dtype: of the base's parameters.
        bf16: autocast to bfloat16.
        gradient_checkpointing: trade time for memory.
        threads: of the CPU; default: torch's.
        device: ``"auto"`` takes an accelerator if there is one.
        max_source_tokens, max_target_tokens: longer texts are cut.
    """

    steps: Count = 1000
    batch_size: Annotated[int, Number, Field(ge=1, le=10**6)] = 16
    learning_rate: Positive = 1e-3
    learning_rates: dict[Name, NotNegative] = {}
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = (
        "cosine"
    )
    warmup_steps: CountOr0 | None = None
    warmup_ratio: Rate | None = None
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    gradient_accumulation: Annotated[int, Number, Field(ge=1, le=10**6)] = 1
    similar_lengths: StrictBool = False
    packing: Count | None = None
    eval_every: Count | None = None
    save_every: Count | None = None
    keep_checkpoints: Count = 2
    best: Best | None = None
    patience: Count | None = None
    report_to: Union[Tracker, list[Tracker]] = []
    log_every: Count | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    bf16: StrictBool = False
    gradient_checkpointing: StrictBool = False
    threads: Annotated[int, Number, Field(ge=1, le=4096)] | None = None
    device: Literal["auto", "cpu"] = "auto"
    max_source_tokens: Annotated[int, Number, Field(ge=2, le=10**7)] = 512
    max_target_tokens: Annotated[int, Number, Field(ge=2, le=10**7)] = 256

    @model_validator(mode="after")
    def _one_warmup(self) -> TrainingSettings:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps: or warmup_ratio:, not both")
        if self.patience is not None and self.best is None:
            raise ValueError("patience: goes with best:, which says what to wait for")
        if self.best is not None and self.eval_every is None:
            raise ValueError("best: goes with eval_every:, the steps between evaluations")
        if self.best is not None and self.save_every not in (None, self.eval_every):
            raise ValueError(
                "with best:, a checkpoint is saved at each evaluation; leave out save_every:"
            )
        longest = self.max_source_tokens + self.max_target_tokens
        if self.packing is not None and self.packing < longest:
            raise ValueError(
                f"packing: {self.packing} tokens do not hold the longest row, max_source_tokens + max_target_tokens = "
                f"{longest}"
            )
        return self


class EvaluationSettings(Form):
    """How to evaluate.

    Attributes:
        batch_size: rows at a time.
        max_new_tokens: the longest answer.
        num_beams: 1 is greedy.
        limit: rows a combination at most; the first ones.
        at_end: evaluate at the end of training too.
        unseen_group_weights: factors for groups of features in combinations never trained, e.g. ``{language: 0.0}``.
        samples: answers kept for each combination.
        left_out: whether to evaluate, at the end, what leaving out each feature costs.
    """

    batch_size: Annotated[int, Number, Field(ge=1, le=10**6)] = 32
    max_new_tokens: Count = 64
    num_beams: Count = 1
    limit: Count | None = 200
    at_end: StrictBool = True
    unseen_group_weights: dict[Name, Finite] = {}
    samples: CountOr0 = 20
    left_out: StrictBool = True


class Settings(Form):
    """A whole configuration.

    Attributes:
        model: the base model's folder, relative to the configuration file, or its hub name.
        kind: the kind of the data sets' tasks; a data set may have its own.
        tokenizer: folder or hub name; default: the model's.
        output: the folder that a run writes, relative to the configuration file.
        datasets: sources of rows.
        held_out: combinations that are never trained on; a row is held out if it has all features of one of them.
        registry: the features by group; default: as the datasets name them.
        implies: features that others imply, ``{"task=ner": ["family=word"], "task=*": ["shared=all"]}``.
        ranks: a rule with its arguments, or one rank for all.
        alpha, scaling, target_modules, exclude_modules, rank_pattern, alpha_pattern: as for ``FlixConfig``.
        feature_dropout: rates, or one rate for all groups.
        lora_dropout: as for ``FlixConfig``.
        unknown: what to do with an unknown feature in evaluation.
        temperature: combinations are drawn with p ∝ n^(1/temperature).
        cap: the most rows that a combination counts for, as for :class:`flix.data.Mixture`.
        init: as for ``FlixConfig``.
        start_from: a run or an adapter to start from; features that it has keep their ids, ranks and alphas.
        freeze_start: whether those features stay as they are.
        seed: the seed of initial values, sampling, dropout and training.
        training, evaluation: see there.
        base_folder: what relative paths are relative to; set by the reader.
    """

    model: Name
    kind: Kind | None = None
    tokenizer: Name | None = None
    output: Name = "flix-run"
    datasets: Annotated[list[DatasetSettings], Field(min_length=1)]
    held_out: list[Union[Name, dict[Name, Name]]] = []
    registry: dict[Name, list[Name]] | None = None
    implies: dict[Name, Names] = {}
    ranks: Ranks = UniformRanks(rule="uniform", rank=8)
    alpha: Alphas | None = None
    scaling: Literal["lora", "rslora"] = "lora"
    target_modules: Names = "all-linear"
    exclude_modules: Name | list[Name] = []
    rank_pattern: dict[Name, Union[Rank, ByFeature]] = {}
    alpha_pattern: dict[Name, Alphas] = {}
    feature_dropout: DropoutSettings | None = None
    lora_dropout: Annotated[float, Number, Field(ge=0.0, lt=1.0)] = 0.0
    unknown: Union[Literal["error", "skip", "mean"], dict[Name, Names]] = "error"
    temperature: Positive = 2.0
    cap: Union[Count, dict[Name, Union[Count, dict[Name, Count]]]] | None = None
    seed: Annotated[int, Number, Field(ge=0, lt=2**32)] = 0
    init: Literal["uniform", "orthogonal"] = "uniform"
    start_from: Name | None = None
    freeze_start: StrictBool = False
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    base_folder: Path = Field(default=Path("."), exclude=True, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if is_whole(data.get("ranks")):
            data["ranks"] = {"rule": "uniform", "rank": data["ranks"]}
        if is_number(data.get("feature_dropout")):
            data["feature_dropout"] = {"p": data["feature_dropout"]}
        return data

    @model_validator(mode="after")
    def _kinds(self) -> Settings:
        if self.freeze_start and self.start_from is None:
            raise ValueError("freeze_start: goes with start_from:, which says what to freeze")
        for number, dataset in enumerate(self.datasets):
            if dataset.stream and self.training.similar_lengths:
                raise ValueError(
                    f"training.similar_lengths looks ahead, which streams do not allow, and "
                    f"datasets[{number}] streams"
                )
            if dataset.kind is None and self.kind is None:
                raise ValueError(
                    f"datasets[{number}] has no kind:, and the configuration has none for all; the kinds are: "
                    f"{', '.join(get_args(Kind))}"
                )
            if self.training.packing and (kind := dataset.kind or self.kind) != "causal":
                raise ValueError(
                    f"training.packing is for causal tasks, and datasets[{number}] is {kind}"
                )
        return self

    @property
    def output_folder(self) -> Path:
        """Where a run writes."""
        return self.base_folder / os.path.expanduser(self.output)

    def to_dict(self) -> dict[str, Any]:
        """A form for YAML and JSON; reading it again from the same folder gives equal settings."""
        return self.model_dump(mode="json")
