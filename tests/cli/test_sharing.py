"""``share``, ``combine`` and ``import``, on files alone; and what commands say of removed features."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import flix
from flix.cli.app import app
from flix.core.adapter.composition import delta
from flix.core.adapter.described import Head
from tests.helpers.training import ok


def mistake(message: str, *arguments: object) -> None:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def renamed(adapter: Path, out: Path, old: str, new: str) -> Path:
    changed = flix.rename_feature(flix.load_adapter(adapter), "language", old, new)
    flix.save_adapter(changed, out)
    return out


def changed(adapter: Path, out: Path) -> Path:
    whole = flix.load_adapter(adapter)
    tensors = {n: t + 1 if n.endswith(".A.task.ner") else t for n, t in whole.tensors.items()}
    flix.save_adapter(flix.Adapter(whole.config, whole.layers, tensors), out)
    return out


def same(first: flix.Adapter, second: flix.Adapter, feature: tuple[str, str]) -> bool:
    active = ((feature, 1.0),)
    return all(
        np.allclose(delta(first, path, active), delta(second, path, active), rtol=1e-6)
        for path in first.layers
    )


def test_share(adapter: Path, tmp_path: Path) -> None:
    said = ok("share", adapter, "--features", "language=hau", "--out", tmp_path / "hau")
    assert said["features"] == ["language=hau"] and said["layers"] == 2
    whole, alone = flix.load_adapter(adapter), flix.load_adapter(tmp_path / "hau")
    assert said["parameters"] == sum(t.size for t in alone.tensors.values())
    assert alone.config.registry.features == (("language", "hau"),)
    assert same(whole, alone, ("language", "hau"))
    # swa implies the task, which comes along
    said = ok("share", adapter, "--features", "language=swa,", "--out", tmp_path / "swa")
    assert said["features"] == ["language=swa", "task=ner"]
    both = ok("share", adapter, "--features", "language=hau, task=ner", "--out", tmp_path / "b")
    again = ok(
        "share", adapter, "--features", "language=hau", "--features", "task=ner",
        "--out", tmp_path / "c",
    )  # fmt: skip
    assert both["features"] == again["features"] == ["language=hau", "task=ner"]
    several = ok("share", adapter, "--features", "language=hau+swa", "--out", tmp_path / "d")
    assert several["features"] == ["language=hau", "language=swa", "task=ner"]
    before = ok("share", adapter, "--features", "language:hau", "--out", tmp_path / "e")
    assert before["features"] == ["language=hau"]


def test_share_takes_names_that_hold_separators(adapter: Path, tmp_path: Path) -> None:
    odd = renamed(adapter, tmp_path / "odd", "hau", "a:b,c")
    said = ok("share", odd, "--features", "language=a:b,c", "--out", tmp_path / "out")
    assert said["features"] == ["language=a:b,c"]


def test_share_says_that_heads_stay_behind(adapter: Path, tmp_path: Path) -> None:
    head = {"head.bias": Head("F32", np.zeros(3, "f4"))}
    flix.save_adapter(replace(flix.load_adapter(adapter), heads=head), adapter)
    arguments = ["share", str(adapter), "--features", "task=ner", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert "shared task=ner" in result.stdout and "heads" in result.stdout
    assert flix.load_adapter(tmp_path / "out").heads == {}


def test_combine(adapter: Path, tmp_path: Path) -> None:
    ok("share", adapter, "--features", "language=hau", "--out", tmp_path / "hau")
    other = renamed(adapter, tmp_path / "other", "hau", "yor")
    said = ok("combine", tmp_path / "hau", other, "--out", tmp_path / "all")
    assert said["features"] == ["language=hau", "language=yor", "language=swa", "task=ner"]
    joined = flix.load_adapter(tmp_path / "all")
    assert same(flix.load_adapter(adapter), joined, ("language", "hau"))
    assert same(flix.load_adapter(other), joined, ("language", "yor"))


def test_combine_with_conflicts(adapter: Path, tmp_path: Path) -> None:
    other = changed(adapter, tmp_path / "other")
    out = tmp_path / "all"
    mistake("task=ner (", "combine", adapter, other, "--out", out)
    assert not out.exists()
    for policy, winner in (("keep", adapter), ("replace", other)):
        ok("combine", adapter, other, "--out", out, "--conflicts", policy, "--force")
        found, wanted = flix.load_adapter(out), flix.load_adapter(winner)
        assert same(wanted, found, ("task", "ner"))
    assert not same(flix.load_adapter(adapter), flix.load_adapter(other), ("task", "ner"))
    mistake("error, keep, replace", "combine", adapter, other, "--out", out, "--conflicts", "x", "--force")  # fmt: skip


def test_the_recipe_of_an_earlier_adapter_does_not_stay(adapter: Path, tmp_path: Path) -> None:
    """``predict`` would ask the new adapter with the old one's prompts, tasks and base."""
    out, lora = tmp_path / "out", peft_lora(tmp_path / "lora")
    whole = ("--features", "language=hau+swa,task=ner")
    other = renamed(adapter, tmp_path / "other", "hau", "yor")
    for command in (
        ("share", adapter, *whole),  # the same features as before, but perhaps of another run
        ("combine", adapter, other),
        ("import", f"ner={lora}", "--group", "task"),
    ):
        flix.save_adapter(flix.load_adapter(adapter), out)
        (out / "recipe.json").write_text("{}")
        (out / "notes.txt").write_text("mine")
        ok(*command, "--out", out, "--force")
        assert sorted(p.name for p in out.iterdir()) == ["flix.safetensors", "flix_config.json", "notes.txt"]  # fmt: skip
    (out / "recipe.json").write_text("{}")
    mistake("has no feature 'x'", "share", adapter, "--features", "task=x", "--out", out, "--force")  # fmt: skip
    assert (out / "recipe.json").exists()


def peft_lora(folder: Path, rank: int = 2, **settings: Any) -> Path:
    draw = np.random.default_rng(rank)
    folder.mkdir()
    stem = "base_model.model.a"
    tensors = {
        f"{stem}.lora_A.weight": draw.normal(size=(rank, 4)).astype("f4"),
        f"{stem}.lora_B.weight": draw.normal(size=(6, rank)).astype("f4"),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3 * rank, **settings}
    if settings.get("modules_to_save"):
        tensors["base_model.model.score.weight"] = np.zeros((2, 4), "f4")
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_import(tmp_path: Path) -> None:
    one, two = peft_lora(tmp_path / "one", 2), peft_lora(tmp_path / "two", 3)
    out = tmp_path / "out"
    said = ok("import", f"ner={one}", f"pos={two}", "--group", "task", "--out", out)
    assert said["features"] == ["task=ner", "task=pos"] and said["layers"] == 1
    wanted = flix.from_peft({"ner": one, "pos": two}, "task")
    for feature in (("task", "ner"), ("task", "pos")):
        assert same(wanted, flix.load_adapter(out), feature)
    text = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    assert "task=pos" in text and "2 features in task (2)" in text


def test_import_leaves_modules_out_when_asked(tmp_path: Path) -> None:
    lora = peft_lora(tmp_path / "one", modules_to_save=["score"])
    arguments = ["import", f"ner={lora}", "--group", "task", "--out", tmp_path / "out"]
    mistake("more than low-rank pairs", *arguments)
    assert ok(*arguments, "--skip-modules")["features"] == ["task=ner"]


def test_mistakes_end_with_2(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    share = ["share", adapter, "--features"]
    mistake("did you mean 'hau'?", *share, "language=hua", "--out", out)
    mistake("not of the form group=name", *share, "language", "--out", out)
    mistake("names no feature", *share, ",", "--out", out)
    mistake("is not empty", *share, "task=ner", "--out", full)
    mistake("is a file", *share, "task=ner", "--out", full / "x")
    mistake("another folder", *share, "task=ner", "--out", adapter, "--force")
    mistake("is not an adapter", "share", full, "--features", "task=ner", "--out", out)
    mistake("two adapters or more", "combine", adapter, "--out", out)
    mistake("given twice", "combine", adapter, adapter, "--out", out)
    lora = peft_lora(tmp_path / "lora", use_dora=True)
    imported = ["import", f"ner={lora}", "--group", "task", "--out", out]
    mistake("DoRA", *imported)
    mistake("--from", *imported, "--from", "loha")
    mistake("not of the form name=FOLDER", "import", "ner", "--group", "task", "--out", out)
    mistake("given twice", "import", "a=x", "a=y", "--group", "task", "--out", out)
    mistake("no adapter_config.json", "import", f"ner={full}", "--group", "t", "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("command", ["share", "combine", "import"])
def test_no_framework_is_loaded(command: str, adapter: Path, tmp_path: Path) -> None:
    arguments = {
        "share": ["share", str(adapter), "--features", "task=ner"],
        "combine": ["combine", str(adapter), str(changed(adapter, tmp_path / "o"))],
        "import": ["import", f"ner={peft_lora(tmp_path / 'l')}", "--group", "task"],
    }[command]
    arguments += ["--conflicts", "keep"] if command == "combine" else []
    code = f"""
import sys
sys.argv = ["flix", *{[*arguments, "--out", str(tmp_path / "out")]!r}]
from flix.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = [n for n in ("torch", "transformers", "peft", "jax", "tensorflow") if n in sys.modules]
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_removed_features_are_not_listed_as_live(adapter: Path, tmp_path: Path) -> None:
    flix.save_adapter(
        flix.remove_feature(flix.load_adapter(adapter), "language", "hau"), tmp_path / "less"
    )
    data = ok("inspect", tmp_path / "less")
    assert [(e["id"], e["feature"]) for e in data["features"]] == [(1, "swa"), (2, "ner")]
    assert data["features"][0]["implies"] == ["task=ner"] and data["removed"] == ["language=hau"]
    text = CliRunner().invoke(app, ["inspect", str(tmp_path / "less"), "--layers"]).stdout
    assert "2 features in language (1), task (1)" in text
    assert text.count("language=hau") == 1 and "ids reserved: language=hau" in text
    planned = ok("plan", tmp_path / "less")
    assert [e["feature"] for e in planned["features"]] == ["swa", "ner"]
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "less")]).stdout
    assert "2 features in 2 layers" in shown and "hau" not in shown
