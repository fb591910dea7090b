"""``make gpu-study GPU=--dry-run``: it goes through everything, and the same command goes on where it was."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("sacrebleu")

from benchmarks.report import ROOT
from flix.study.evidence import EvidenceError
from flix.study.results import keep
from flix.study.words import Cell, Pair, WordsData, write_words

LANGUAGES = {"deu": "germanic", "fra": "italic", "ita": "italic"}


def words(folder):
    """Three tasks in three languages; one cell is for the last word."""

    def pairs(language, split, count=4):
        return tuple(Pair(f"{split}{language}{'abcdef'[i]}", f"/{i}/") for i in range(count))

    cells = []
    for language in LANGUAGES:
        for task in ("pron", "segment"):
            held = "test" if (task, language) == ("pron", "fra") else None
            train = () if held else pairs(language, "train")
            cells.append(Cell(language, task, train, (), pairs(language, "test", 2), held))
        lines = tuple(Pair(p.source[:-1] + "_", p.source) for p in pairs(language, "train"))
        cells.append(Cell(language, "denoise", lines, (), ()))
    families = {"pron": "sound", "segment": "word", "denoise": "repair"}
    said = {"build": 1, "seed": 0}
    write_words(WordsData(tuple(cells), families, LANGUAGES, fingerprint=said), folder)
    return folder


def run(*given):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_study", *map(str, given)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_without_a_card_it_says_so(tmp_path):
    done = run(tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr and "--dry-run" in done.stderr


@pytest.mark.slow
def test_the_dry_run_goes_through_everything(tmp_path):
    given = (words(tmp_path / "words"), "--out", tmp_path / "out", "--dry-run")
    done = run(*given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 steps for every arm, 3 at a time" in done.stdout
    said = json.loads((tmp_path / "out" / "scores.json").read_bytes())
    assert said["study"] == "gpu" and said["missing"] == []
    assert said["command"][:3] == ["python", "-m", "benchmarks.gpu_study"]
    assert {arm["seeds"]["0"]["steps"] for arm in said["arms"].values()} == {3}
    flix, wide = (said["arms"][name] for name in ("flix", "lora-parameters"))
    assert flix["trainable"] == wide["trainable"]
    groups = {cell["group"] for cell in flix["seeds"]["0"]["cells"].values()}
    assert groups == {"seen", "last_word"}
    record = json.loads((tmp_path / "out" / "pretraining.json").read_bytes())
    assert record["steps"] == 20 and record["compared"] == 12 and record["dry_run"]
    with pytest.raises(EvidenceError, match="is a dry run"):
        keep(tmp_path / "out", tmp_path / "kept")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("runs/*/run.json")}
    again = run(*given)
    assert again.returncode == 0 and "step 1/" not in again.stdout, again.stdout + again.stderr
    assert times == {file: file.stat().st_mtime_ns for file in times} and len(times) == 3
    other = run(*given, "--seed", "1")
    assert other.returncode == 2 and "has a base with seed 0, and 1 is asked for" in other.stderr
