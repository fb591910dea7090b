"""Tiny local models, data and configurations as files: fixtures for the tests of training and of the commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import flix
from flix.cli.app import app
from flix.core.adapter.adapter import LayerShape
from flix.training.data import Data, read_data
from flix.training.reading import read_settings

run = CliRunner().invoke
Write = Callable[..., Path]
WORDS = {"hau": ["gida", "ruwa", "kogi"], "swa": ["nyumba", "maji", "mto"], "yor": ["ile", "omi"]}
TASKS = ("ner", "pos", "rev")


@pytest.fixture(autouse=True, scope="session")
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, and what is read is kept in a folder of the tests."""
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)
        yield


def _save_model(folder: Path, kind: str) -> Path:
    import torch
    import transformers as tf

    torch.manual_seed(0)
    if kind == "t5":
        model: Any = tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=384, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2,
                decoder_start_token_id=0, dropout_rate=0.1,
            )
        )  # fmt: skip
    elif kind == "llama":
        model = tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=1,
            )
        )  # fmt: skip
    else:
        model = tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=384, n_embd=16, n_layer=1, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=1,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tf.ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny T5, Llama and GPT-2, each with a byte-level tokenizer."""
    root = tmp_path_factory.mktemp("models")
    return {kind: _save_model(root / kind, kind) for kind in ("t5", "llama", "gpt2")}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<task>.jsonl`` with a language column, 12 rows for every language and task."""
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        lines = [
            {"lang": lang, "source": f"{words[i % len(words)]} {i}", "target": f"{task[0]}{i}"}
            for i in range(12)
            for lang, words in WORDS.items()
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def config(tmp_path: Path, models: dict[str, Path], data: Path) -> Write:
    """Writes a configuration; keywords replace top-level keys, ``training`` and ``evaluation`` are merged."""

    def write(model: str = "t5", name: str = "train.yaml", **changes: Any) -> Path:
        settings: dict[str, Any] = {
            "model": str(models.get(model, model)),
            "kind": "causal" if model in ("llama", "gpt2") else "seq2seq",
            "output": "run",
            "datasets": [
                {
                    "files": str(data / f"{task}.jsonl"),
                    "features": {"task": task},
                    "feature_columns": {"language": "lang"},
                    "prompt": "{task}: {source}",
                    "eval_rows": 2,
                }
                for task in TASKS
            ],
            "held_out": [{"language": "yor", "task": "rev"}],
            "implies": {"task=*": "shared=all"},
            "ranks": {"rule": "by_group", "language": 1, "task": 2, "shared": 2},
            "feature_dropout": {"per_group": {"language": 0.5}},
            "seed": 3,
            "training": {"steps": 10, "batch_size": 4, "learning_rate": 0.01, "threads": 1},
            "evaluation": {"max_new_tokens": 3, "limit": 2},
        }
        for key, value in changes.items():
            if key in ("training", "evaluation"):
                settings[key] = {**settings[key], **value}
            else:
                settings[key] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter's folder made without any framework: two layers, three features."""
    registry = flix.FeatureRegistry(
        {"language": ["hau", "swa"], "task": ["ner"]}, {("language", "swa"): [("task", "ner")]}
    )
    made = flix.FlixConfig(
        registry=registry, ranks=flix.ranks.by_group(language=2, task=3), alpha=4.0
    )
    layers = {"a": LayerShape(d_in=4, d_out=6), "b": LayerShape(d_in=5, d_out=3)}
    draw = np.random.default_rng(0)
    tensors = {}
    for path, shape in layers.items():
        for group, name in registry.features:
            rank = made.rank(path, (group, name))
            tensors[f"{path}.A.{group}.{name}"] = draw.normal(size=(rank, shape.d_in)).astype("f4")
            tensors[f"{path}.B.{group}.{name}"] = draw.normal(size=(shape.d_out, rank)).astype("f4")
    folder = tmp_path / "adapter"
    flix.save_adapter(flix.Adapter(made, layers, tensors), folder)
    return folder


def data_of(path: Path) -> Data:
    """What a configuration's data sets hold."""
    return read_data(read_settings(path))


def rows_of(data: Data) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that are trained on, and those to evaluate on."""
    halves = data.mixture.training_rows(), data.mixture.evaluation_rows()
    training, evaluation = (half.__getitems__(range(len(half))) for half in halves)
    return training, evaluation


def ok(*arguments: object) -> Any:
    """The JSON that a command prints; it must succeed."""
    result = run(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def trained(config: Write, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Trains a little: (configuration, adapter)."""

    def train(model: str, **changes: Any) -> tuple[Path, Path]:
        path = config(model, **changes)
        ok("train", path)
        return path, tmp_path / "run" / "adapter"

    return train


def weights_of(run_folder: Path) -> dict[str, bytes]:
    """The trained values, bit for bit. (The file's header may order its metadata differently.)"""
    tensors = flix.load_adapter(run_folder / "adapter").tensors
    return {name: value.tobytes() for name, value in tensors.items()}
