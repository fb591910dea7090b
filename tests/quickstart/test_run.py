"""The whole quickstart, small: does it run, and does what it prints hold together?"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("simplemma")
pytest.importorskip("sacrebleu")
from flix.quickstart import run
from flix.study.jobs import Job


@pytest.mark.slow
def test_fast_quickstart_prints_json_and_leaves_its_results(tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "flix.cli",
        "quickstart",
        "--fast",
        "--json",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert list(results["arms"]) == ["flix", "lora-parameters", "lora-compute"]
    for arm in results["arms"].values():
        assert 0.0 <= arm["scores"]["seen"]["exact"]["mean"] <= 100.0
        assert arm["trainable"] > 0 and len(arm["cells"]) == 1
    assert results["arms"]["flix"]["active_rank"] == results["arms"]["lora-compute"]["total_rank"]
    assert results["arms"]["flix"]["trainable"] == results["arms"]["lora-parameters"]["trainable"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"report: {out / 'report.html'}" in done.stderr and "num2dig" in page
    shown = done.stderr.partition("FLix answers")[2]
    assert shown.count("/date2") + shown.count("/num2") + shown.count("/lemma") >= 5
    assert "What to try next" in done.stderr
    import flix

    adapter = flix.load_adapter(out / "flix-0" / "adapter")
    assert set(adapter.config.registry.groups) == {"language", "task", "family", "shared"}
    trained = [name for name in adapter.tensors if ".B." in name and adapter.tensors[name].any()]
    assert len(trained) > len(adapter.tensors) / 4


def test_an_arm_that_fails_ends_the_quickstart_with_what_it_wrote(
    data, tmp_path, monkeypatch, capsys
):
    def prepared(*_):
        job = Job("flix, seed 0", tmp_path / "flix-0", 3, anew=True)
        job.beside(".yaml").write_text("model: 3\n")
        return [job]

    monkeypatch.setattr(run, "load_data", lambda progress: data)
    monkeypatch.setattr(run, "prepared", prepared)
    assert run.main(out=tmp_path, steps=3) == 1
    assert re.search(r"flix, seed 0 failed:\n(.|\n)*SettingsError", capsys.readouterr().err)
