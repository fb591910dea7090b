"""Configurations: what is read, and how mistakes are named by line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from flix.training.errors import SettingsError
from flix.training.reading import parse_settings, read_settings
from flix.training.settings import ByGroupRanks, DropoutSettings, UniformRanks

BASE = """model: m
kind: seq2seq
datasets:
  - files: a.jsonl
    features: {language: hau, task: ner}
"""


def test_minimal_has_defaults() -> None:
    settings = parse_settings(BASE)
    assert settings.ranks == UniformRanks(rule="uniform", rank=8)
    assert settings.training.steps == 1000 and settings.held_out == []


def test_short_forms() -> None:
    settings = parse_settings(BASE + "ranks: 4\nfeature_dropout: 0.5\n")
    assert settings.ranks == UniformRanks(rule="uniform", rank=4)
    assert settings.feature_dropout == DropoutSettings(p=0.5)
    grouped = parse_settings(BASE + "ranks: {rule: by_group, language: 1, task: 2}\n").ranks
    assert isinstance(grouped, ByGroupRanks) and grouped.model_extra == {"language": 1, "task": 2}
    # PyYAML reads 5e-3 as text; a number is meant.
    assert parse_settings(BASE + "training: {learning_rate: 5e-3}\n").training.learning_rate == 5e-3


def test_resolved_settings_read_the_same() -> None:
    import yaml

    settings = parse_settings(BASE + "ranks: {rule: by_group, language: 1, task: 2}\n")
    again = parse_settings(yaml.safe_dump(settings.to_dict()))
    assert again == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede: 3\n", "c.yaml:6: unknown key 'sede' (did you mean 'seed'?)"),
        ("training:\n  steps: 3\n  stesp: 3\n", "c.yaml:8: unknown key 'stesp' in training"),
        ("ranks: {rule: unifrom, rank: 3}\n", "no rank rule 'unifrom' (did you mean 'uniform'?)"),
        ("ranks: {rule: uniform, rnk: 3}\n", "unknown key 'rnk' in ranks (did you mean 'rank'?)"),
        (
            "ranks: {rank: 3}\n",
            "ranks: needs a rule: uniform, by_group, explicit, proportional, compute_matched or parameter_matched",
        ),
        ("ranks: {rule: by_group, task: -1}\n", "ranks.task"),
        ("training: {steps: 0}\n", "training.steps: should be greater than or equal to 1, got 0"),
        # A batch is gathered as a whole, so a slip of the keyboard would take hours.
        (
            "training: {batch_size: 1000000000}\n",
            "training.batch_size: should be less than or equal to 1000000",
        ),
        (
            "training: {gradient_accumulation: 1000000000}\n",
            "training.gradient_accumulation: should be less than or equal to 1000000",
        ),
        ("training: {warmup_steps: 1, warmup_ratio: 0.1}\n", "not both"),
        (
            "held_out:\n  - {language: no, task: ner}\n",
            "c.yaml:7: held_out[0].language: must be text",
        ),
        ("kind: causal\n", "c.yaml:6: key 'kind' is given twice (first in line 2)"),
        ("x: [\n", "c.yaml:7: not valid YAML"),
        ("feature_dropout: {per_group: {language: 1.5}}\n", "feature_dropout.per_group.language"),
        ("unknown: sometimes\n", "'error', 'skip' or 'mean'"),
        ("base_folder: x\n", "unknown key 'base_folder'"),
        ("cap: 0\n", "cap: should be greater than or equal to 1"),
        (
            "training: {best: seen.scores, eval_every: 1}\n",
            "training.best: should be 'loss', 'seen.loss'",
        ),
        ("training: {best: loss}\n", "best: goes with eval_every:"),
        ("training: {best: loss, eval_every: 2, save_every: 3}\n", "leave out save_every:"),
        ("training: {patience: 2}\n", "patience: goes with best:"),
        (
            "training: {report_to: tensorbord}\n",
            "training.report_to: should be 'tensorboard', 'wandb' or 'mlflow'",
        ),
        ("training: {report_to: [wandb, x]}\n", "training.report_to[1]: should be"),
        (
            "training: {learning_rates: {language: -1}}\n",
            "training.learning_rates.language: should be greater",
        ),
        ("evaluation: {left_out: 3}\n", "evaluation.left_out"),
        ("training: {similar_lengths: 3}\n", "training.similar_lengths: "),
        ("training: {packing: 1024}\n", "training.packing is for causal tasks, and datasets[0] is"),
        ("training: {packing: 700}\n", "packing: 700 tokens do not hold the longest row"),
        ("training: {packing: true}\n", "training.packing: must be a number"),
        ("scaling: big\n", "'lora' or 'rslora'"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(BASE + text, "c.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mapping of keys"),
        ("model: m\nkind: seq2seq\n", "the key 'datasets' is missing"),
        (
            BASE.replace("files:", "file:"),
            "unknown key 'file' in datasets[0] (did you mean 'files'?)",
        ),
        (BASE.replace("    features", "    hub: x\n    features"), "either files: or hub:"),
        (
            BASE + "    feature_columns: {task: t}\n",
            "'task' is in two of features:, feature_columns: and the files' names",
        ),
        (
            "model: m\nkind: seq2seq\ndatasets:\n  - files: a\n",
            "needs features: or feature_columns:, or {group}",
        ),
        (BASE.replace("a.jsonl", "'{task}.jsonl'"), "'task' is in two of features:"),
        (
            BASE.replace("kind: seq2seq\n", ""),
            "datasets[0] has no kind:, and the configuration has none",
        ),
        (
            BASE + "    kind: sequence\n",
            "datasets[0].kind: should be 'seq2seq', 'causal', 'classification'",
        ),
        (BASE + "    labels: []\n", "datasets[0].labels: list should have at least 1 item"),
        (BASE + "    subset: s\n", "go with hub:"),
    ],
)
def test_mistakes_in_datasets(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(text, "c.yaml")
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read"):
        read_settings(tmp_path / "none.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(SettingsError, match="not UTF-8"):
        read_settings(tmp_path / "bin.yaml")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_settings(tmp_path)
