"""Forms from YAML: how each mistake is said, with its file, line and key."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

import pydantic
import pytest

from flix.core.errors import SettingsError
from flix.core.strictfields import (
    Count,
    CountOr0,
    FeatureValue,
    Finite,
    Name,
    Names,
    NotNegative,
    Positive,
    Rank,
    Rate,
)
from flix.core.strictforms import Reading


class Form(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Uniform(Form):
    rule: Literal["uniform"]
    rank: Rank = 8


class Grouped(Form):
    rule: Literal["grouped"]
    sizes: dict[Name, Union[Rank, dict[Name, Rank]]]


class Source(Form):
    files: Names
    features: dict[Name, FeatureValue] = pydantic.Field(default_factory=dict)
    limit: CountOr0 | None = None
    ranks: Uniform | None = None


class Whole(Form):
    model: Name
    folder: Any = None
    named: dict[Name, Source] = pydantic.Field(default_factory=dict)
    sources: Annotated[list[Source], pydantic.Field(min_length=1)] = pydantic.Field(
        default_factory=lambda: [Source(files="x")]
    )
    ranks: Annotated[Union[Uniform, Grouped], pydantic.Field(discriminator="rule")] = Uniform(rule="uniform")  # fmt: skip
    steps: Count = 10
    warmup: Rate = 0.0
    learning_rate: Positive = 1e-3
    decay: NotNegative = 0.0
    alpha: Union[Finite, dict[Name, Finite], None] = None
    mode: Literal["seq2seq", "causal"] = "causal"
    best: Name | None = None

    @pydantic.model_validator(mode="after")
    def _best_is_of_the_mode(self) -> Whole:
        if self.best == self.mode:
            raise ValueError("best: must be another thing than the mode")
        return self

    @pydantic.field_validator("decay")
    @classmethod
    def _decay_is_small(cls, value: float) -> float:
        if value > 1:
            raise ValueError(f"must be small, got {value:g}")
        return value


READING = Reading(Whole, ("folder",), "rule", (Uniform, Grouped), "rank rule")


def read(text: str, **given: Any) -> Any:
    return READING.read("model: m\n" + text, "c.yaml", **given)


def refused(text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        read(text)
    return str(caught.value)


def test_a_form_is_read_with_what_only_code_gives() -> None:
    found = read(
        "sources:\n- files: [a, b]\n  features: {task: ner, language: {hau: 1, swa: 0.5}}\n  limit: 0\n"
        "ranks: {rule: grouped, sizes: {task: 2, language: {hau: 3}}}\nlearning_rate: 5e-3\n",
        folder="here",
    )
    assert found.folder == "here" and found.learning_rate == 5e-3
    assert found.sources[0].features == {"task": "ner", "language": {"hau": 1.0, "swa": 0.5}}
    assert found.ranks == Grouped(rule="grouped", sizes={"task": 2, "language": {"hau": 3}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "steps: 1\nwarmpu: 0\n",
            "c.yaml:3: unknown key 'warmpu' (did you mean 'warmup'?); known keys: alpha, best, decay, learning_rate, mode, "
            "model, named, ranks, sources, steps, warmup",
        ),
        ("folder: x\n", "c.yaml:2: unknown key 'folder'"),
        (
            "sources:\n- files: a\n- files: b\n  feature: {}\n",
            "c.yaml:5: unknown key 'feature' in sources[1] (did you mean 'features'?); known keys: features, files, limit, ranks",
        ),
        (
            "named: {ranks: {files: a, file: b}}\n",  # a name that is a field's elsewhere
            "c.yaml:2: unknown key 'file' in named.ranks (did you mean 'files'?); known keys: features, files, limit, ranks",
        ),
        (
            "named: {features: {files: a, file: b}}\n",
            "c.yaml:2: unknown key 'file' in named.features (did you mean 'files'?); known keys: features, files, limit, ranks",
        ),
        (
            "ranks:\n  rule: uniform\n  size: 2\n",
            "c.yaml:4: unknown key 'size' in ranks; known keys: rank, rule",
        ),
        ("sources:\n- limit: 3\n", "c.yaml:3: sources[0]: the key 'files' is missing"),
        ("ranks: {rule: grouped}\n", "c.yaml:2: ranks: the key 'sizes' is missing"),
        (
            "ranks: {rule: uniformly}\n",
            "c.yaml:2: ranks: no rank rule 'uniformly' (did you mean 'uniform'?); there are: uniform, grouped",
        ),
        ("ranks: {rank: 2}\n", "c.yaml:2: ranks: needs a rule: uniform or grouped"),
        ("steps: 0\n", "c.yaml:2: steps: should be greater than or equal to 1, got 0"),
        ("steps: 1.5\n", "c.yaml:2: steps: should be a valid integer, got a number with a fractional part, got 1.5"),
        (f"steps: {10**12}\n", "c.yaml:2: steps: should be less than or equal to 1000000000, got 1000000000000"),
        ("warmup: 1.5\n", "c.yaml:2: warmup: should be less than or equal to 1, got 1.5"),
        ("learning_rate: 0\n", "c.yaml:2: learning_rate: should be greater than 0, got 0"),
        ("learning_rate: .inf\n", "c.yaml:2: learning_rate: should be a finite number, got inf"),
        ("decay: 2\n", "c.yaml:2: decay: must be small, got 2"),
        ("mode: casual\n", "c.yaml:2: mode: should be 'seq2seq' or 'causal', got 'casual'"),
        ("mode: seq2seq\nbest: seq2seq\n", "c.yaml:1: best: must be another thing than the mode"),
        ("best: ''\n", "c.yaml:2: best: string should have at least 1 character, got ''"),
        ("best: \"a\\0b\"\n", "c.yaml:2: best: holds a NUL character, which no name and no path can contain"),
        ("sources: []\n", "c.yaml:2: sources: list should have at least 1 item after validation, not 0, got []"),
        ("sources: {files: a}\n", "c.yaml:2: sources: should be a valid list, got {'files': 'a'}"),
        ("sources: [a]\n", "c.yaml:2: sources[0]: should be a mapping of keys, got 'a'"),
        (
            "sources:\n- files: a\n  features: {task: [ner, {}]}\n",
            "c.yaml:4: sources[0].features.task[1]: should be a valid string, got {}",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_said_with_its_place(text: str, message: str) -> None:
    assert refused(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best: on\n", "c.yaml:2: best: must be text; YAML reads on without quotes as a truth value (True) - quote it"),
        ("best: 1.50\n", "c.yaml:2: best: must be text; YAML reads 1.50 without quotes as a number (1.5) - quote it"),
        (
            "sources:\n- files:\n  - a\n  - 2020-01-01\n",
            "c.yaml:5: sources[0].files[1]: must be text; YAML reads 2020-01-01 without quotes as a date (2020-01-01) - quote it",
        ),
        ("sources:\n- files:\n", "c.yaml:3: sources[0].files: must be text; YAML reads nothing without quotes as nothing (None) - quote it"),
        ("steps: yes\n", "c.yaml:2: steps: must be a number; YAML reads yes without quotes as a truth value (True)"),
        ("warmup: off\n", "c.yaml:2: warmup: must be a number; YAML reads off without quotes as a truth value (False)"),
        (
            "sources:\n- files: a\n  features: {task: {ner: on}}\n",
            "c.yaml:4: sources[0].features.task.ner: must be a number; YAML reads on without quotes as a truth value (True)",
        ),
    ],
)  # fmt: skip
def test_a_word_that_yaml_reads_as_another_thing_is_shown(text: str, message: str) -> None:
    assert refused(text) == message


def test_where_text_or_a_number_may_stand_both_are_said() -> None:
    class Either(Form):
        value: Union[Name, Finite]

    with pytest.raises(SettingsError) as caught:
        Reading(Either, (), "rule", (), "rule").read("value: no", "e")
    assert str(caught.value) == (
        "e:1: value: must be text or a number; YAML reads no without quotes as a truth value (False) - quote it"
    )


def test_the_first_line_with_an_error_is_said_and_how_many_more_have_one() -> None:
    assert refused("steps: 0\nwarmup: 2\n") == (
        "c.yaml:2: steps: should be greater than or equal to 1, got 0 (and 1 more line with errors)"
    )
    assert refused("steps: 0\nwarmup: 2\ndecay: x\nmode: y\n").endswith("got 0 (and 3 more lines with errors)")  # fmt: skip


def test_the_keys_of_the_whole_may_be_missing() -> None:
    with pytest.raises(SettingsError, match=r"^c\.yaml:1: the key 'model' is missing$"):
        READING.read("steps: 3\n", "c.yaml")


@pytest.mark.parametrize(
    ("text", "shown"), [("", "None"), ("- a", "['a']"), ("word", "'word'"), ("7", "7")]
)
def test_what_is_no_mapping_is_no_form(text: str, shown: str) -> None:
    with pytest.raises(SettingsError) as caught:
        READING.read(text, "c.yaml")
    assert str(caught.value) == f"c.yaml: a configuration is a mapping of keys, got {shown}"


@pytest.mark.parametrize("version", ["in", "out of"])
def test_half_of_a_surrogate_pair_is_no_text(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What YAML's reader in C refuses, the other one lets through."""
    import yaml

    if version == "out of":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    message = refused('best: "\\ud800"\n')
    assert message.startswith("c.yaml") and message.isprintable()
    assert "not valid YAML" in message or "best: should be a valid string" in message
