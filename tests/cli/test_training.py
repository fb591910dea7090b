"""``train``, ``evaluate``, ``merge`` and ``export`` from the outside, on tiny models."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from typer.testing import CliRunner

import flix
from flix.backends.torch import load
from flix.cli.app import app
from flix.core.adapter.initial import initial_a
from flix.training.reading import read_settings
from tests.helpers.tolerance import assert_close

run = CliRunner().invoke
Write = Callable[..., Path]


def ok(*arguments: object) -> Any:
    """The JSON that a command prints; it must succeed."""
    result = run(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def weights_of(run_folder: Path) -> dict[str, bytes]:
    """The trained values, bit for bit. (The file's header may order its metadata differently.)"""
    tensors = flix.load_adapter(run_folder / "adapter").tensors
    return {name: value.tobytes() for name, value in tensors.items()}


def last_row(output: str, name: str) -> str:
    return next(line for line in output.splitlines() if line.startswith(name))


@pytest.mark.parametrize("model", ["t5", "llama", "gpt2"])
def test_train_from_the_outside(
    config: Write, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flix.training import batches

    drawn: list[dict[str, Any]] = []
    collate = batches.Collator.__call__

    def spy(self: Any, items: Any) -> Any:
        drawn.extend(i.row.features for i in items if i.position is not None)
        return collate(self, items)

    monkeypatch.setattr(batches.Collator, "__call__", spy)
    # Yoruba is held out whole: its feature must not learn anything.
    path = config(model, held_out=[{"language": "yor"}], training={"eval_every": 5})
    result = run(app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    assert "step 10/10" in result.stdout and "average, held out" in result.stdout
    assert result.stderr == ""

    assert len(drawn) == 40 and all(f["language"] != "yor" for f in drawn)
    output = tmp_path / "run"
    adapter = flix.load_adapter(output / "adapter")
    moved = dict.fromkeys(adapter.config.registry.features, 0.0)
    for layer, shape in adapter.layers.items():
        for feature in moved:
            a, b = adapter.pair(layer, feature)
            moved[feature] = max(moved[feature], float(np.abs(b).max()))
            if feature == ("language", "yor"):
                fresh = initial_a(
                    seed=3, layer=layer, group="language", feature="yor",
                    rank=a.shape[0], d_in=shape.d_in,
                )  # fmt: skip
                assert np.array_equal(a, fresh)
    assert moved["language", "yor"] == 0.0
    assert all(value > 0 for f, value in moved.items() if f != ("language", "yor"))

    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == 10 and len(metrics["training_rows"]) == 6
    assert [e["step"] for e in metrics["evaluation_losses"]] == [5, 10]
    assert set(metrics["evaluation_losses"][0]) == {"step", "seen_loss", "held_out_loss"}
    seen = {c["cell"]: c["seen"] for c in metrics["evaluation"]["cells"]}
    assert len(seen) == 9 and sum(seen.values()) == 6
    # The resolved configuration is a configuration, with every default spelled out.
    resolved = yaml.safe_load((output / "config.yaml").read_text())
    assert resolved["training"]["schedule"] == "cosine"
    assert read_settings(output / "config.yaml").to_dict() == read_settings(path).to_dict()
    # A checkpoint holds the adapter and what resuming needs, not the base.
    files = {p.name for p in (output / "checkpoints" / "checkpoint-10").iterdir()}
    assert {"flix.safetensors", "flix_config.json", "optimizer.pt", "scheduler.pt"} <= files
    assert {"rng_state.pth", "trainer_state.json"} <= files
    assert not any("model" in name or "pytorch" in name for name in files)


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_resume_is_bit_for_bit(config: Write, tmp_path: Path, model: str) -> None:
    """With the base's dropout (T5), feature dropout, accumulation, momentum, a schedule and evaluations."""
    training = {
        "steps": 8, "save_every": 3, "eval_every": 2, "gradient_accumulation": 2, "warmup_steps": 2,
        "weight_decay": 0.1, "log_every": 1, "batch_size": 3, "keep_checkpoints": 5,
    }  # fmt: skip
    path = config(model, training=training, evaluation={"at_end": False})
    whole = ok("train", path)
    output = tmp_path / "run"
    weights = weights_of(output)
    # As if the run had been killed between steps 3 and 6, in the middle of writing a checkpoint.
    for name in ("adapter", "checkpoints/checkpoint-6", "checkpoints/checkpoint-8"):
        shutil.rmtree(output / name)
    (output / "metrics.json").unlink()
    (output / "checkpoints" / "checkpoint-6").mkdir()
    torch.manual_seed(12345)
    resumed = ok("train", path, "--resume")
    assert weights_of(output) == weights
    assert resumed["losses"] == whole["losses"]
    assert resumed["evaluation_losses"] == whole["evaluation_losses"]
    # A run that is done trains no more.
    done = ok("train", path, "--resume")
    assert done["steps"] == 8
    assert weights_of(output) == weights


def test_runs_repeat(config: Write, tmp_path: Path) -> None:
    small = {"training": {"steps": 3}, "evaluation": {"at_end": False}}
    for name in ("one", "two"):
        ok("train", config(name=f"{name}.yaml", output=name, **small))
    ok("train", config(name="three.yaml", output="three", seed=4, **small))
    one, two, three = (weights_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three


def test_resume_and_overwrite_mistakes(config: Write, tmp_path: Path) -> None:
    small = {"training": {"steps": 1}, "evaluation": {"at_end": False}}
    path = config(**small)
    result = run(app, ["train", str(path), "--resume"])
    assert result.exit_code == 2 and "nothing to resume" in result.stderr
    ok("train", path)
    result = run(app, ["train", str(path)])
    assert result.exit_code == 2 and "--resume continues it" in result.stderr
    changed = config(temperature=1.0, **small)
    result = run(app, ["train", str(changed), "--resume"])
    assert result.exit_code == 2 and "temperature was 2.0 and is 1.0 now" in result.stderr
    result = run(app, ["train", str(config(training={"steps": 2, "batch_size": 5})), "--resume"])
    assert result.exit_code == 2 and "training.batch_size was 4 and is 5 now" in result.stderr
    # A mistake found before training leaves the earlier run alone; otherwise it is replaced.
    result = run(app, ["train", str(config(kind="causal", **small)), "--overwrite"])
    assert result.exit_code == 2 and (tmp_path / "run" / "adapter").is_dir()
    ok("train", config(**small), "--overwrite")


def test_diverging_runs_stop(config: Write) -> None:
    training = {"learning_rate": 1e30, "max_grad_norm": 0, "log_every": 1, "schedule": "constant"}
    result = run(app, ["train", str(config(training=training))])
    assert result.exit_code == 2 and "lower training.learning_rate" in result.stderr


@pytest.mark.parametrize(
    "training", [{"gradient_checkpointing": True}, {"bf16": True}, {"dtype": "bfloat16"}]
)
@pytest.mark.parametrize("model", ["t5", "llama"])
def test_precision_and_checkpointing(
    config: Write, tmp_path: Path, model: str, training: dict[str, Any]
) -> None:
    common = {"evaluation": {"at_end": False}}
    ok("train", config(model, training={"steps": 3}, **common))
    plain = flix.load_adapter(tmp_path / "run" / "adapter").tensors
    ok("train", config(model, training={"steps": 3, **training}, **common), "--overwrite")
    other = flix.load_adapter(tmp_path / "run" / "adapter").tensors
    moved = [name for name in plain if ".B." in name and np.abs(plain[name]).max() > 0]
    assert moved and all(np.abs(other[name]).max() > 0 for name in moved)
    if training == {"gradient_checkpointing": True}:
        for name, value in plain.items():
            assert_close(other[name], value)


@pytest.fixture
def trained(config: Write, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Trains a little: (configuration, adapter)."""

    def train(model: str, **changes: Any) -> tuple[Path, Path]:
        path = config(model, **changes)
        ok("train", path)
        return path, tmp_path / "run" / "adapter"

    return train


@pytest.mark.parametrize("model", ["t5", "llama"])
def test_evaluate(trained: Any, config: Write, models: dict[str, Path], model: str) -> None:
    path, adapter = trained(model, training={"learning_rate": 0.02, "steps": 80})
    result = ok("evaluate", path, adapter)
    metrics = json.loads((adapter.parent / "metrics.json").read_text())
    assert {k: result[k] for k in ("cells", "seen", "held_out")} == metrics["evaluation"]
    assert result["held_out"]["cells"] == 1 and result["seen"]["cells"] == 8
    cell = result["cells"][0]
    assert {"cell", "seen", "rows", "exact_match", "chrf", "samples"} == set(cell)
    # Batches of one give the same answers: padding changes nothing.
    alone = config(model, evaluation={"batch_size": 1})
    assert ok("evaluate", alone, adapter)["cells"] == result["cells"]
    # With all groups switched off, a combination never trained is answered by the base.
    off = config(
        model, evaluation={"unseen_group_weights": {"language": 0, "task": 0, "shared": 0}}
    )
    answers = {c["cell"]: c["samples"] for c in ok("evaluate", off, adapter)["cells"]}
    held = answers.pop("task=rev,language=yor")
    assert held != next(c["samples"] for c in result["cells"] if not c["seen"])
    assert answers == {c["cell"]: c["samples"] for c in result["cells"] if c["seen"]}
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
    assert "average, seen" in result.stdout and "task=rev,language=yor" in result.stdout
    assert json.loads((tmp_path / "x" / "r.json").read_text())["seen"]["cells"] == 8


def test_evaluate_mistakes(trained: Any, config: Write) -> None:
    path, adapter = trained("llama", training={"steps": 1}, evaluation={"at_end": False})
    result = run(app, ["evaluate", str(config("gpt2")), str(adapter)])
    assert result.exit_code == 2 and "another architecture" in result.stderr
    datasets = [{**d, "eval_rows": 0} for d in yaml.safe_load(path.read_text())["datasets"]]
    result = run(
        app, ["evaluate", str(config("llama", datasets=datasets, held_out=[])), str(adapter)]
    )
    assert result.exit_code == 2 and "nothing to evaluate on" in result.stderr


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
    assert said["features"]["language:hau"] == 0.5 and said["tokenizer"] is True
    cls = transformers.AutoModelForSeq2SeqLM if model == "t5" else transformers.AutoModelForCausalLM
    plain = cls.from_pretrained(merged)
    assert "Routed" not in str(type(plain).__mro__)
    adapted = load(cls.from_pretrained(models[model]), adapter)
    registry = flix.load_adapter(adapter).config.registry
    routing = registry.encode([{"language": {"hau": 0.5, "swa": 1.0}, "task": "ner"}])
    wanted = logits(adapted, flix_features=routing.ids, flix_weights=routing.weights)
    assert not torch.allclose(wanted, logits(cls.from_pretrained(models[model])), atol=1e-4)
    assert_close(logits(plain), wanted)
    assert transformers.AutoTokenizer.from_pretrained(merged)("a").input_ids

    lora = tmp_path / "lora"
    said = ok("export", adapter, *common, "--to", "peft", "--out", lora)
    assert said["rank"] == said["vllm"]["max_lora_rank"] - 2 == 6
    assert said["vllm"]["ok"] is (model == "llama") and said["error"] == 0.0
    peft = pytest.importorskip("peft")
    opened = peft.PeftModel.from_pretrained(cls.from_pretrained(models[model]), lora)
    assert_close(logits(opened), wanted)


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


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.setattr("sys.argv", ["make_tiny.py", "--out", str(tmp_path / "tiny")])
    runpy.run_path(str(examples / "make_tiny.py"), run_name="__main__")
    text = (examples / "train.yaml").read_text()
    for long, short in (("steps: 60", "steps: 4"), ("max_new_tokens: 24", "max_new_tokens: 4")):
        assert long in text
        text = text.replace(long, short)
    (tmp_path / "train.yaml").write_text(text)
    result = run(app, ["train", str(tmp_path / "train.yaml")])
    assert result.exit_code == 0, result.output
    assert "2 cells" in last_row(result.stdout, "average, held out")
