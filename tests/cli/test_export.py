"""``flix export`` and ``flix merge`` on models with weights: what they print, and what goes along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from flix.backends.torch import adapt, save  # noqa: E402
from flix.cli.app import app  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import ask, batch, make, output, randomize  # noqa: E402

ROW = {"language": "swa", "task": "pos"}


def run(command: str, folder: Path, *arguments: object) -> Any:
    common = ["--base", str(folder / "base"), "--features", "language=swa,task=pos"]
    return CliRunner().invoke(
        app, [command, str(folder / "adapter"), *common, *map(str, arguments)]
    )


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    make("llama").save_pretrained(tmp_path / "base")
    model = adapt(make("llama"), config())
    randomize(model)
    save(model, tmp_path / "adapter")
    return model.eval()


def test_export_prints_what_vllm_needs(llama: Any, tmp_path: Path) -> None:
    out = tmp_path / "swa-pos"
    result = run("export", tmp_path, "--to", "peft", "--out", out)
    assert result.exit_code == 0 and "a LoRA of rank 7" in result.stdout
    assert f"vllm serve {tmp_path}/base --enable-lora --max-lora-rank 8" in result.stdout
    assert f'--lora-modules swa-pos={out}; requests say "model": "swa-pos"' in result.stdout


def test_export_as_json(llama: Any, tmp_path: Path) -> None:
    out = tmp_path / "swa-pos"
    said = json.loads(run("export", tmp_path, "--out", out, "--json").stdout)
    assert said["rank"] == 7 and said["layers"] == 14 and said["error"] == 0.0
    assert said["vllm"]["ok"] and said["vllm"]["model"] == "swa-pos"
    assert said["vllm"]["flags"].endswith(f"--max-lora-rank 8 --lora-modules swa-pos={out}")


def test_export_cuts_when_asked(llama: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    out = tmp_path / "cut"
    said = json.loads(run("export", tmp_path, "--out", out, "--compress-to", 2, "--json").stdout)
    assert said["rank"] == 2 and 0.01 < said["error"] < 0.95
    opened = peft.PeftModel.from_pretrained(make("llama"), out).double().eval()
    wanted = ask(llama, "llama", [ROW] * 4)
    assert_far(output(opened(**batch("llama"))), wanted, at_least=1e-4)
    text = run("export", tmp_path, "--out", out, "--compress-to", 2, "--force").stdout
    assert "cut to rank 2: the update's relative error is" in text
    wrong = run("export", tmp_path, "--out", tmp_path / "x", "--compress-to", 0)
    assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1


def classifier() -> Any:
    torch.manual_seed(3)
    settings = make("bert").config
    settings.num_labels = 3
    return transformers.BertForTokenClassification(settings).double()


def test_a_trained_head_goes_along(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path / "base")
    model = adapt(classifier(), config())
    randomize(model)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.requires_grad_(True).add_(torch.randn_like(parameter))
    save(model, tmp_path / "adapter")
    wanted = ask(model, "bert", [ROW] * 4)

    assert run("merge", tmp_path, "--out", tmp_path / "merged").exit_code == 0
    merged = transformers.BertForTokenClassification.from_pretrained(tmp_path / "merged")
    assert_close(output(merged.double().eval()(**batch("bert"))), wanted)

    result = run("export", tmp_path, "--out", tmp_path / "lora")
    assert "would not serve it" in result.stdout and "got classifier" in result.stdout
    peft = pytest.importorskip("peft")
    opened = peft.PeftModel.from_pretrained(classifier(), tmp_path / "lora").double().eval()
    assert_close(output(opened(**batch("bert"))), wanted, dtype="float32")


def test_a_trained_head_needs_a_base_that_has_it(tmp_path: Path) -> None:
    classifier().bert.save_pretrained(tmp_path / "base")
    model = adapt(classifier(), config(target_modules=["query"]))
    model.classifier.requires_grad_(True)
    save(model, tmp_path / "adapter")
    result = run("merge", tmp_path, "--out", tmp_path / "merged")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert not (tmp_path / "merged").exists()
