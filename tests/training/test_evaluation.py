"""``flix evaluate`` on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from flix.cli.app import app
from flix.cli.folders import may_replace
from tests.helpers.training import Write, ok, run


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_evaluate(trained: Any, config: Write, models: dict[str, Path], model: str) -> None:
    path, adapter = trained(model, training={"learning_rate": 0.02, "steps": 80})
    result = ok("evaluate", path, adapter)
    metrics = json.loads((adapter.parent / "metrics.json").read_text())
    for part in ("cells", "seen", "held_out"):
        assert result[part] == metrics[part]
    assert result["held_out"]["cells"] == 1 and result["seen"]["cells"] == 8
    cell = result["cells"][0]
    assert {"cell", "features", "kind", "task", "seen", "rows", "metric", "score", "interval", "scores"} == set(cell)  # fmt: skip
    assert cell["features"] == {"task": ["ner"], "language": ["hau"]} and cell["metric"] == "exact_match"  # fmt: skip
    assert cell["score"] == cell["scores"]["exact_match"] and cell["interval"][0] <= cell["score"] <= cell["interval"][1]  # fmt: skip
    lines = (adapter.parent / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result["samples"]
    # Batches of one give the same answers: padding changes nothing.
    alone = config(model, evaluation={"batch_size": 1})
    assert ok("evaluate", alone, adapter)["cells"] == result["cells"]
    # With all groups switched off, a combination never trained is answered by the base.
    off = config(
        model, evaluation={"unseen_group_weights": {"language": 0, "task": 0, "shared": 0}}
    )
    before, after = (
        [[s for s in r["samples"] if (s["cell"] == "task=rev,language=yor") == wanted] for wanted in (True, False)]
        for r in (result, ok("evaluate", off, adapter))
    )  # fmt: skip
    assert after[1] == before[1] and len(after[1]) == 16
    held = after[0]
    assert held != before[0] and len(held) == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[model])
    base = (
        transformers.AutoModelForSeq2SeqLM if model == "t5" else transformers.AutoModelForCausalLM
    ).from_pretrained(models[model])
    for sample in held:
        ids = tokenizer(f"rev: {sample['source']}", return_tensors="pt").input_ids
        ids = ids if model == "t5" else ids[:, :-1]
        out = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )
        out = out if model == "t5" else out[:, ids.shape[1] :]
        assert tokenizer.decode(out[0], skip_special_tokens=True).strip() == sample["output"]


def test_evaluate_with_beams_and_a_file(trained: Any, config: Write, tmp_path: Path) -> None:
    _, adapter = trained("t5", evaluation={"at_end": False})
    path = config(evaluation={"num_beams": 3})
    result = run(
        app, ["evaluate", str(path), str(adapter), "--out", str(tmp_path / "x" / "r.json")]
    )
    assert result.exit_code == 0, result.output
    assert "average, seen" in result.stdout
    assert json.loads((tmp_path / "x" / "r.json").read_text())["seen"]["cells"] == 8
    assert may_replace(tmp_path / "x" / "r.json", "cells", lacks="training")  # evaluated again


def test_evaluate_overwrites_nothing_but_scores(config: Write, adapter: Path, tmp_path: Path) -> None:  # fmt: skip
    path = config()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"source": "a"}\n{"source": "b"}\n')
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"cells": [], "training": {}}')
    for out in (path, adapter / "flix.safetensors", adapter / "flix_config.json", rows, metrics):
        before = out.read_bytes()
        result = run(app, ["evaluate", str(path), str(adapter), "--out", str(out)])
        assert result.exit_code == 2 and "holds no scores of flix evaluate" in result.stderr
        assert out.read_bytes() == before
    (tmp_path / "empty").touch()  # as mktemp makes one
    assert may_replace(tmp_path / "empty", "cells")


def test_evaluate_mistakes(trained: Any, config: Write) -> None:
    path, adapter = trained("llama", training={"steps": 1}, evaluation={"at_end": False})
    result = run(app, ["evaluate", str(config("gpt2")), str(adapter)])
    assert result.exit_code == 2 and "another architecture" in result.stderr
    datasets = [{**d, "eval_rows": 0} for d in yaml.safe_load(path.read_text())["datasets"]]
    result = run(
        app, ["evaluate", str(config("llama", datasets=datasets, held_out=[])), str(adapter)]
    )
    assert result.exit_code == 2 and "nothing to evaluate on" in result.stderr
