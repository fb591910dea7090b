"""Every command with wrong files, folders, options and values: exit code 2, one line, no traceback, in seconds."""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flix.cli.app import app
from flix.training.settings import (
    DatasetSettings,
    DropoutSettings,
    EvaluationSettings,
    Settings,
    TrainingSettings,
)
from tests.helpers.training import run

LINE = {"lang": "hau", "source": "a", "target": "b"}
TEXT = json.dumps(LINE)


@pytest.fixture
def place(
    tmp_path: Path, models: dict[str, Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder of files and folders of all kinds that no command can use, beside a model and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "t5").symlink_to(models["t5"])
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "text").write_text("x")
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    os.symlink("loop", tmp_path / "loop")
    return tmp_path


def settings_of(**changes: Any) -> dict[str, Any]:
    base = {
        "model": "t5",
        "kind": "seq2seq",
        "output": "run",
        "datasets": [
            {
                "files": "data/ner.jsonl",
                "features": {"task": "ner"},
                "feature_columns": {"language": "lang"},
            }
        ],
        "ranks": {"rule": "by_group", "language": 1, "task": 1},
        "training": {"steps": 2, "batch_size": 2, "threads": 1},
        "evaluation": {"max_new_tokens": 2, "limit": 1},
    }
    return {**copy.deepcopy(base), **changes}


def written(settings: dict[str, Any], name: str = "t.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    return name


def refused(*arguments: object, codes: tuple[int, ...] = (2,), within: float = 20) -> str:
    """Runs a command, which must end with one line and code 2 (or well, if 0 is among the codes)."""
    began = time.perf_counter()
    result = run(app, [str(a) for a in arguments])
    shown = (arguments, result.exit_code, result.stderr, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), shown
    assert result.exit_code in codes, shown
    if result.exit_code == 2:
        assert result.stderr.startswith("flix: error: ") and result.stderr.count("\n") == 1, shown
        assert len(result.stderr) > 25 and "Traceback" not in result.stderr, shown
    result.stderr.encode("utf-8", "backslashreplace")
    assert time.perf_counter() - began < within, shown
    return str(result.stderr)


PATHS = ["none", "text", "empty", "binary", "folder", "text/x", "loop", "n" * 300, "", "/dev/null", "\udcff"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_paths_that_are_not_what_a_command_reads(place: Path, adapter: Path, path: str) -> None:
    config = written(settings_of())
    for command in (
        ["plan", path], ["train", path], ["inspect", path], ["inspect", "--check", path],
        ["evaluate", path, adapter], ["evaluate", config, path],
        ["predict", path, "data/ner.jsonl"], ["predict", adapter, path],
        ["combine", adapter, path, "--out", "o"], ["combine", path, adapter, "--out", "o"],
        ["share", path, "--features", "language=hau", "--out", "o"],
        ["import", f"ner={path}", "--group", "task", "--out", "o"],
        ["merge", path, "--base", "t5", "--features", "language=hau", "--out", "o"],
        ["export", path, "--base", "t5", "--features", "language=hau", "--out", "o"],
        ["merge", adapter, "--base", path, "--features", "language=hau", "--out", "o"],
        ["export", adapter, "--base", path, "--features", "language=hau", "--out", "o"],
    ):  # fmt: skip
        refused(*command)
    for key in ("model", "tokenizer"):
        if path:
            refused("train", written(settings_of(**{key: path.replace("\udcff", "nothing")})))
    assert not (place / "o").exists() and not (place / "run").exists()


@pytest.mark.parametrize("out", ["text", "text/x", "full", "ADAPTER", "n" * 300, "/proc/nope/x", "/dev/null/x"])  # fmt: skip
def test_places_that_cannot_be_written(place: Path, adapter: Path, out: str) -> None:
    out = str(adapter) if out == "ADAPTER" else out
    features = ["--features", "language=hau"]
    refused("share", adapter, *features, "--out", out)
    shutil.copytree(adapter, place / "other")
    refused("combine", adapter, "other", "--out", out)
    refused("merge", adapter, "--base", "t5", *features, "--out", out)
    refused("export", adapter, "--base", "t5", *features, "--out", out)
    if out not in ("full", str(adapter)):
        refused("train", written(settings_of(output=out)))
        refused("quickstart", "--fast", "--out", out)


def test_a_full_disk_is_one_line(place: Path, adapter: Path, config: Callable[..., Path]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no full device")
    made = config(training={"steps": 1})
    assert run(app, ["train", str(made)]).exit_code == 0
    message = refused("evaluate", made, place / "run" / "adapter", "--out", "/dev/full")
    assert "/dev/full: No space left on device" in message or "No space left" in message


@pytest.mark.parametrize(
    "text",
    [
        "", "x", ",", "language", "language=", "=hau", "language=hua", "langage=hau", "language=hau+", "language=+hau",
        "language=h\u200bau", "language=*", "*=hau", "a" * 5000, "language=" + "a" * 5000, "language=\udcff", "language: hau",
    ],
    ids=lambda text: ascii(text)[:20],
)  # fmt: skip
def test_features_that_are_none(place: Path, adapter: Path, text: str) -> None:
    for command in (["merge", adapter, "--base", "t5"], ["export", adapter, "--base", "t5"], ["share", adapter]):  # fmt: skip
        if text == "language: hau" and command[0] == "share":
            continue  # as it was written before
        refused(*command, "--features", text, "--out", "o")
    assert not (place / "o").exists()


@pytest.mark.parametrize(
    "text", ["language=hau:x", "language=hau:1e39", "language=hau:nan", "language=hau:inf", "language=hau:" + "9" * 5000, "language=hau,language=swa"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_weights_that_are_none(place: Path, adapter: Path, text: str) -> None:
    for command in ("merge", "export"):
        refused(command, adapter, "--base", "t5", "--features", text, "--out", "o")


def test_other_options(place: Path, adapter: Path) -> None:
    shutil.copytree(adapter, place / "other")
    export = ["export", adapter, "--base", "t5", "--features", "language=hau", "--out", "o"]
    for command in (
        ["combine", adapter, "other", "--out", "o", "--conflicts", "maybe"],
        ["combine", adapter, "--out", "o"], ["combine", adapter, adapter, "--out", "o"],
        [*export, "--to", "x"], [*export, "--compress-to", 0], [*export, "--compress-to", -1],
        ["import", "a=b", "--group", "g", "--out", "o", "--from", "x"],
        ["plan", adapter, "--explain", "--device", "abacus"],
        ["evaluate", written(settings_of()), adapter, "--out", "full"],
        ["predict", adapter, "data/ner.jsonl", "--output", "full"],
        ["evaluate", written(settings_of()), adapter, "--out", "text/x"],
        *(["import", text, "--group", "g", "--out", "o"] for text in ("a", "=b", "a=", "a\u200b=b", " a=b")),
        *(["import", f"a={adapter}", "--group", g, "--out", "o"] for g in ("", "a.b", " x", "x\u200b")),
    ):  # fmt: skip
        refused(*command)
    assert not (place / "o").exists()


# What people write, and what nobody would: none of it may escape as anything but one line.
WRONG = [
    None, True, 3, -1, 1.5, math.nan, math.inf, 10**30, "", "x", " ", "a\u0301\u200b", "\0", "~nobody/x", "/", "a" * 3000,
    [], ["a"], [[]], [None], {}, {"a": 1}, {"a": {"b": 1}}, {"x": None}, {"language": True},
]  # fmt: skip
SECTIONS = {
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "feature_dropout": DropoutSettings,
}
RULES: dict[str, dict[str, Any]] = {
    "uniform": {"rank": 2},
    "by_group": {"language": 1, "task": 1},
    "explicit": {"ranks": {"language": 1, "task": 1}},
    "proportional": {"budget": 9, "sizes": None, "temperature": 2, "minimum": 1, "maximum": 64},
    "compute_matched": {"lora_rank": 4},
    "parameter_matched": {"lora_rank": 4},
}


def every_key() -> dict[str, Callable[[dict[str, Any], Any], None]]:
    found: dict[str, Callable[[dict[str, Any], Any], None]] = {}
    for key in Settings.model_fields:
        if key != "base_folder":
            found[key] = lambda s, v, key=key: s.update({key: v})
    for section, form in SECTIONS.items():
        for key in form.model_fields:
            found[f"{section}.{key}"] = lambda s, v, section=section, key=key: s.setdefault(section, {}).update({key: v})  # fmt: skip
    for key in DatasetSettings.model_fields:
        if key != "hub":
            found[f"datasets.{key}"] = lambda s, v, key=key: s["datasets"][0].update({key: v})
    for rule, good in RULES.items():
        for key in good:
            found[f"ranks.{rule}.{key}"] = lambda s, v, rule=rule, good=good, key=key: s.update({"ranks": {"rule": rule, **good, key: v}})  # fmt: skip
    return found


KEYS = every_key()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.filterwarnings("ignore:.*differ only")
@pytest.mark.filterwarnings("default:exclude_modules:UserWarning")
def test_wrong_values_at_every_key(place: Path, key: str) -> None:
    ended = set()
    for value in WRONG:
        settings = settings_of()
        KEYS[key](settings, value)
        result = refused("plan", written(settings), codes=(0, 2))
        ended.add("error" if result else "ok")
    assert "error" in ended


LINES = {
    "empty": "", "blank": "\n\n", "cut": TEXT[:-3], "a list": "[1]\n", "a number": "3\n", "null": "null",
    "NaN": TEXT.replace('"b"', "NaN"), "Infinity": TEXT.replace('"a"', "-Infinity"), "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000, "many digits": TEXT.replace('"b"', "9" * 5000), "true": TEXT.replace('"b"', "true"),
    "half a pair": TEXT.replace('"a"', '"\\ud800"'), "half a pair as a name": TEXT.replace('"hau"', '"\\ud800"'),
    "no name": TEXT.replace('"hau"', "null"), "a number as a name": TEXT.replace('"hau"', "3"),
    "no names": TEXT.replace('"hau"', "[]"), "a text as weight": TEXT.replace('"hau"', '{"hau": "x"}'),
    "NaN as weight": TEXT.replace('"hau"', '{"hau": NaN}'), "a weight beyond": TEXT.replace('"hau"', '{"hau": 1e39}'),
    "no weight": TEXT.replace('"hau"', '{"hau": null}'), "a blank": TEXT.replace('"hau"', '"hau "'),
    "invisible": TEXT.replace('"hau"', '"h\\u200bau"'), "lists in lists": TEXT.replace('"hau"', '[["hau"]]'),
    "an empty name": TEXT.replace('"hau"', '""'), "no column": '{"lang":"hau","target":"b"}',
    "an object": TEXT.replace('"b"', '{"x":1}'),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINES)
def test_rows_that_are_none(place: Path, kind: str) -> None:
    (place / "bad.jsonl").write_text(LINES[kind], encoding="utf-8")
    dataset = {**settings_of()["datasets"][0], "files": "bad.jsonl"}
    message = refused("plan", written(settings_of(datasets=[dataset])))
    assert "bad.jsonl" in message or kind in ("empty", "blank")


FILES = {
    "latin.jsonl": TEXT.replace("a", "é").encode("latin-1"), "utf16.jsonl": TEXT.encode("utf-16"),
    "binary.jsonl": bytes(range(256)), "cut.jsonl.gz": gzip.compress((TEXT + "\n").encode() * 1000)[:-20],
    "bad.jsonl.gz": b"\x1f\x8b" + b"x" * 50, "flipped.jsonl.gz": gzip.compress(os.urandom(3000))[:40] + b"zz",
    "empty.csv": b"", "header.csv": b"lang,source,target\n",
    "twice.csv": b"lang,lang,source\nx,y,z\n", "few.csv": b"lang,source,target\na,b\n", "many.csv": b"lang,source,target\na,b,c,d\n",
    "quote.csv": b'lang,source,target\na,"b,c\n', "latin.csv": b"lang,source,target\n\xe9,b,c\n",
    "name.csv": b"lang,source,target\n,b,c\n", "cut.csv.gz": gzip.compress(b"lang,source\nhau,b\n"),
    "text.parquet": b"nope", "empty.parquet": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_damaged(place: Path, name: str) -> None:
    (place / name).write_bytes(FILES[name])
    dataset = {**settings_of()["datasets"][0], "files": name}
    message = refused("plan", written(settings_of(datasets=[dataset])))
    assert name in message or name in ("header.csv", "empty.csv")


@pytest.mark.parametrize("pattern", ["none*", "[", "**x", "data", "../*/none", "~/none.jsonl", "t.yaml/x", "."])  # fmt: skip
def test_patterns_that_match_nothing(place: Path, pattern: str) -> None:
    dataset = {**settings_of()["datasets"][0], "files": pattern}
    assert "dataset" in refused("plan", written(settings_of(datasets=[dataset])))


def test_runs_and_models_that_are_damaged(place: Path, models: dict[str, Path]) -> None:
    config = written(settings_of())
    assert run(app, ["train", config]).exit_code == 0
    refused("train", config)
    refused("train", config, "--resume", "--overwrite")
    refused("train", written(settings_of(seed=4), "other.yaml"), "--resume")
    for text in ("[]", "{}", "x", "[" * 100_000, ""):
        (place / "run" / "checkpoints" / "run.json").write_text(text)
        refused("train", config, "--resume")
    for name in ("config.json", "model.safetensors"):
        bad = place / f"bad-{name}"
        shutil.copytree(models["t5"], bad)
        for content in (b"", b"\xff\xfe", b"{}", b"[]", b"null", b'{"model_type": 3}', b"[" * 50_000):  # fmt: skip
            (bad / name).write_bytes(content)
            refused("train", written(settings_of(model=bad.name, output="new"), "bad.yaml"))
    for model in ("t6", "./t6", "nobody/nothing", "folder", "a/b/c", "~/none", "x" * 400):
        refused("train", written(settings_of(model=model, output="new"), "bad.yaml"))
    refused("train", written(settings_of(tokenizer="folder", output="new"), "bad.yaml"))
    assert not (place / "new").exists()
