"""``flix merge`` and ``flix export`` of what was trained."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import flix
from flix.backends.torch import load
from flix.cli.app import app
from tests.helpers.tolerance import assert_close, assert_far
from tests.helpers.training import Write, ok, run


def logits(model: Any, **routing: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 90, 101, 1]])
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **extra, **routing).logits


@pytest.mark.parametrize("model", ["t5", "llama", "gpt2"])
def test_merge_and_export(
    trained: Any, models: dict[str, Path], tmp_path: Path, model: str
) -> None:
    _, adapter = trained(model, evaluation={"at_end": False})
    common = ["--base", models[model], "--features", "language=hau:0.5+swa,task=ner"]
    merged = tmp_path / "merged"
    said = ok("merge", adapter, *common, "--out", merged)
    assert said["features"]["language=hau"] == 0.5 and said["tokenizer"] is True
    cls = transformers.AutoModelForSeq2SeqLM if model == "t5" else transformers.AutoModelForCausalLM
    plain = cls.from_pretrained(merged)
    assert "Routed" not in str(type(plain).__mro__)
    adapted = load(cls.from_pretrained(models[model]), adapter)
    registry = flix.load_adapter(adapter).config.registry
    routing = registry.encode([{"language": {"hau": 0.5, "swa": 1.0}, "task": "ner"}])
    wanted = logits(adapted, flix_features=routing.ids, flix_weights=routing.weights)
    assert_far(wanted, logits(cls.from_pretrained(models[model])))
    assert_close(logits(plain), wanted)
    assert transformers.AutoTokenizer.from_pretrained(merged)("a").input_ids

    # Without --base it is the one that the adapter stands on.
    again = tmp_path / "again"
    ok("merge", adapter, *common[2:], "--out", again)
    assert (again / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()

    lora = tmp_path / "lora"
    said = ok("export", adapter, *common[2:], "--to", "peft", "--out", lora)
    assert said["rank"] == said["vllm"]["max_lora_rank"] - 2 == 6
    assert said["vllm"]["ok"] is (model == "llama") and said["error"] == 0.0
    peft = pytest.importorskip("peft")
    opened = peft.PeftModel.from_pretrained(cls.from_pretrained(models[model]), lora)
    assert_close(logits(opened), wanted)


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_base_that_has_changed_is_refused_unless_it_is_named(
    config: Write, models: dict[str, Path], tmp_path: Path, command: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(models["t5"], base)
    ok(
        "train",
        config(
            model=str(base), kind="seq2seq", training={"steps": 1}, evaluation={"at_end": False}
        ),
    )
    adapter = tmp_path / "run" / "adapter"
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(base)
    given = [
        command,
        str(adapter),
        "--features",
        "language=hau,task=ner",
        "--out",
        str(tmp_path / "out"),
    ]
    result = run(app, given)
    assert result.exit_code == 2 and "--base names another place" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run(app, [*given, "--base", str(base)])
    assert result.exit_code == 0 and "other values" in result.stderr, result.stderr
    shutil.rmtree(base)
    result = run(app, [*given, "--force"])
    assert result.exit_code == 2 and "base= says where it is now" in result.stderr, result.stderr


def test_converting_mistakes(trained: Any, models: dict[str, Path], tmp_path: Path) -> None:
    _, adapter = trained("llama", training={"steps": 1}, evaluation={"at_end": False})
    features = ["--features", "language=hau,task=ner"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    for arguments, message in (
        (["merge", adapter, "--base", models["llama"], "--out", full], "is not empty"),
        (["merge", adapter, "--base", models["gpt2"], "--out", tmp_path / "m"], "another architecture"),
        (["merge", adapter, "--base", "./none", "--out", tmp_path / "m"], "no model folder"),
        (["merge", adapter, "--base", models["llama"], "--out", full / "x"], "is a file"),
        (["export", adapter, "--base", models["llama"], "--out", tmp_path / "m", "--to", "gguf"], "--to"),
        (["merge", adapter, "--base", models["llama"], "--out", adapter, "--force"], "another folder"),
    ):  # fmt: skip
        result = run(app, [*map(str, arguments), *features])
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert result.stderr.count("\n") == 1
    text = run(
        app,
        [
            "export",
            str(adapter),
            "--base",
            str(models["llama"]),
            *features,
            "--out",
            str(tmp_path / "l"),
        ],
    )
    assert "--enable-lora --max-lora-rank 8" in text.stdout
