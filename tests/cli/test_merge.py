"""Merged models as plain transformers folders: a process that has no flix reads them, with equal outputs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from flix.backends.torch import adapt, merge, save  # noqa: E402
from flix.cli.app import app  # noqa: E402
from flix.cli.commands.merge import _is_no_model  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.stops import Stopped, leftovers, stopping  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import ask, batch, make, randomize  # noqa: E402

ROW = {"language": {"hau": 0.5, "swa": 1.0}, "task": "ner"}
FEATURES = "language=hau:0.5+swa,task=ner"
MODELS = {
    "llama": ("AutoModelForCausalLM", {}),
    "gpt2": ("AutoModelForCausalLM", {"target_modules": ["wte", "c_attn"]}),
    "bert": ("AutoModel", {}),
    "t5": ("AutoModelForSeq2SeqLM", {"target_modules": ["q", "wo", "shared"]}),
}
READER = """
import json, sys
sys.modules["flix"] = None  # importing it would fail
import torch, transformers
for folder, auto, inputs in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float64).eval()
    assert not any("flix" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        found = model(**{name: torch.tensor(values) for name, values in inputs.items()})
    torch.save(found.logits if "logits" in found else found.last_hidden_state, folder + "/found.pt")
assert not any(name.split(".")[0] == "flix" and module for name, module in sys.modules.items())
"""


def read_elsewhere(folders: dict[str, Path]) -> dict[str, Any]:
    """The outputs that a fresh process without flix computes from folders, for ``batch(name)``."""
    jobs = [
        (str(folder), MODELS[name][0], {k: v.tolist() for k, v in batch(name).items()})
        for name, folder in folders.items()
    ]
    command = [sys.executable, "-c", READER, json.dumps(jobs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return {name: torch.load(folder / "found.pt") for name, folder in folders.items()}


def _adapted(name: str, base: Any) -> Any:
    model = adapt(base, config(**MODELS[name][1]))
    randomize(model)
    return model.eval()


@pytest.fixture
def base(tmp_path):
    """A folder of a tiny Llama with a tokenizer and settings for generation, and an adapter for it."""
    folder = tmp_path / "base"
    model = make("llama")
    model.generation_config.update(max_new_tokens=7, do_sample=True, temperature=0.3)
    model.save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    save(_adapted("llama", model), tmp_path / "adapter")
    return folder


def merge_command(base: Path, out: Path, *more: str) -> Any:
    adapter = str(base.parent / "adapter")
    arguments = ["merge", adapter, "--base", str(base), "--features", FEATURES, *more]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_process_without_flix_reads_them(base, tmp_path):
    wanted = {}
    for name in MODELS:
        model = _adapted(name, make(name))
        wanted[name] = ask(model, name, [ROW] * 4)
        if name == "llama":
            merge_command(base, tmp_path / name)
        else:
            merge(model, ROW).save_pretrained(tmp_path / name)
        assert "flix" not in (tmp_path / name / "config.json").read_text()
    found = read_elsewhere({name: tmp_path / name for name in MODELS})
    for name in MODELS:
        assert_close(found[name], wanted[name], name=name)


def test_the_command_writes_a_whole_folder(base, tmp_path):
    out = tmp_path / "merged"
    assert merge_command(base, out)["tokenizer"] is True
    files = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json"} <= files
    assert "tokenizer_config.json" in files and not any(f.endswith((".bin", ".pt")) for f in files)
    assert not any("flix" in f for f in files)
    kept = transformers.GenerationConfig.from_pretrained(out)
    assert (kept.max_new_tokens, kept.temperature) == (7, 0.3)
    assert transformers.AutoTokenizer.from_pretrained(out)("ab").input_ids


def test_the_dtype_is_that_of_the_bases_file_or_as_one_says(base, tmp_path):
    """A base in half precision, as most are, rounds what was trained in float32; the command says so."""
    half = make("llama").to(torch.float16)
    half.save_pretrained(base)
    model = _adapted("llama", half.to(torch.float32))
    shutil.rmtree(base.parent / "adapter")
    save(model, base.parent / "adapter")
    exact = merge(model, ROW)
    for dtype, off in (("float16", 1e-2), ("float32", 1e-5)):
        more = [] if dtype == "float16" else ["--dtype", dtype]
        assert merge_command(base, tmp_path / dtype, *more)["dtype"] == dtype
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        assert str(found.dtype) == f"torch.{dtype}"
        for (name, a), b in zip(exact.named_parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(b.float(), a, rtol=off, atol=off, msg=name)
    arguments = ["merge", str(base.parent / "adapter"), "--base", str(base), "--features", FEATURES]
    said = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert "in float16" in said.output and "--dtype float32 rounds less" in said.output
    said = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "x"), "--dtype", "float23"])
    assert said.exit_code == 2 and "did you mean 'float32'" in said.stderr


def test_without_a_tokenizer_it_says_so(base, tmp_path):
    for path in base.glob("*token*"):
        path.unlink()
    assert merge_command(base, tmp_path / "merged")["tokenizer"] is False
    assert not list((tmp_path / "merged").glob("*token*"))


def test_the_tokenizer_is_the_one_that_the_run_was_given(base, tmp_path):
    own, recipe = tmp_path / "own", base.parent / "adapter" / "recipe.json"
    transformers.ByT5Tokenizer(extra_ids=7).save_pretrained(own)
    task = {"name": "t", "kind": "causal"}
    recipe.write_text(json.dumps({"format": 1, "model": str(base), "tokenizer": str(own), "tasks": [task]}))  # fmt: skip
    assert merge_command(base, tmp_path / "merged")["tokenizer"] is True
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(found) == len(transformers.ByT5Tokenizer(extra_ids=7))
    # The base's own would be another one.
    shutil.rmtree(own)
    arguments = ["merge", str(base.parent / "adapter"), "--base", str(base), "--features", FEATURES]
    said = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert said.exit_code == 2 and "recipe.json' names is not there" in said.stderr
    assert not (tmp_path / "out").exists()


def test_over_another_model_a_stop_anywhere_leaves_one_of_them_whole(base, tmp_path):
    """``--force``; what an earlier model was read from goes, also under other names, and other files stay."""
    out, key = tmp_path / "merged", "model.layers.0.mlp.up_proj.weight"

    def weights(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return model.state_dict()[key].float()

    def merge_again():
        adapter = str(base.parent / "adapter")
        arguments = [
            "merge",
            adapter,
            "--base",
            str(base),
            "--features",
            FEATURES,
            "--out",
            str(out),
            "--force",
        ]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output

    merge_command(base, tmp_path / "new")
    new = weights(tmp_path / "new")
    old = make("llama")
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(2)
    seen, at = [], 1
    while not seen or seen[-1] is not None:
        shutil.rmtree(out, ignore_errors=True)
        old.save_pretrained(out, max_shard_size="20KB")  # several files and an index
        (out / "adapter_config.json").write_text("{}")
        (out / "notes.txt").write_text("mine")
        with stopping(at, tidy=False) as begun:
            try:
                merge_again()
                seen.append(None)
            except Stopped:
                seen.append(begun[at - 1])
        assert (out / "notes.txt").read_text() == "mine"
        is_new = (out / "tokenizer_config.json").exists()
        assert is_new is not (out / "model.safetensors.index.json").exists()
        assert is_new is not (out / "adapter_config.json").exists()
        (out / "adapter_config.json").unlink(missing_ok=True)
        assert torch.equal(weights(out), new if is_new else old.state_dict()[key].float())
        at += 1
    assert {"exchange", "fsync", "link", "mkdir"} <= {*seen} and leftovers(out) == []


def test_what_is_no_model_stays(base, tmp_path):
    """Files and folders with names that only begin or end as those of a model are the user's own."""
    out = tmp_path / "merged"
    make("llama").save_pretrained(out)
    mine = [
        "tokenizer_data/precious.txt", "tokenizer.json/inside.txt", "vocabulary_list.csv", "vocab_notes.md", "my.model",
        "model_best.safetensors", "pytorch_model_old.bin", "chat_templates.txt", "model-00001-of-00002.txt",
    ]  # fmt: skip
    gone = [
        "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "chat_template.jinja", "pytorch_model.bin",
        "model-00001-of-00002.safetensors", "pytorch_model-00002-of-00003.bin", "pytorch_model.bin.index.json",
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    for name in mine + gone:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    merge_command(base, out, "--force")
    assert [name for name in mine if not (out / name).exists()] == []
    assert [name for name in gone if (out / name).exists()] == []


def test_every_vocabulary_that_transformers_reads_is_known(base):
    """What a tokenizer is read from must not stay beside a new model: it would be read with it."""
    folder = Path(transformers.__file__).parent / "models"
    found = set()
    for file in folder.glob("*/tokenization_*.py"):
        for names in re.findall(
            r"VOCAB_FILES_NAMES = \{(.*?)\}", file.read_text("utf-8"), re.DOTALL
        ):
            found |= set(re.findall(r': "([^"]+)"', names))
    stays = _is_no_model(base)
    assert len(found) > 10 and not [name for name in found if stays(name)]
