"""The whole quickstart, small: does it run, and does what it prints hold together?"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("simplemma")
pytest.importorskip("sacrebleu")


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert list(results["arms"]) == ["flix", "lora-compute", "lora-parameters"]
    for arm in results["arms"].values():
        assert 0.0 <= arm["scores"]["seen"]["exact"]["mean"] <= 100.0
        assert arm["trainable"] > 0 and len(arm["cells"]) == 1
    assert results["arms"]["flix"]["active_rank"] == results["arms"]["lora-compute"]["total_rank"]
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert "What to try next" in done.stderr
    import flix

    adapter = flix.load_adapter(out / "adapter")
    assert set(adapter.config.registry.groups) == {"language", "task", "family", "shared"}
    trained = [name for name in adapter.tensors if ".B." in name and adapter.tensors[name].any()]
    assert len(trained) > len(adapter.tensors) / 4
