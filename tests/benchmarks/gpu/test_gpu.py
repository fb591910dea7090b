"""``make gpu``: without a card it says so; its dry run goes through every section; its file is a part of the page."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from benchmarks import report
from benchmarks.gpu import __main__ as gpu


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words],
        cwd=report.ROOT,
        env={**os.environ, "PYTHONPATH": str(report.ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_without_a_card_it_says_so(tmp_path):
    done = run("--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr and "--dry-run" in done.stderr


def test_sections_share_less_than_eight_minutes():
    assert sum(gpu.SECTIONS.values()) < 8 * 60 - 15  # some seconds are left for finding the card


def test_a_section_that_ends_with_an_error_costs_no_other(monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", "/bin/false")
    found = gpu.section("kernels", 30.0, True)
    assert found["errors"] == {"the section": "the process ended with 1"}


def test_its_file_is_a_part_of_the_page(tmp_path):
    table = {
        "title": "One layer",
        "columns": ["", "ms"],
        "rows": [["flix, fused", {"median": 1.0, "low": 0.9, "high": 1.1}]],
        "note": "",
    }
    part = {
        "figures": {},
        "errors": {"graph": "Traceback\nRuntimeError: no"},
        "skipped": {"long": "no time was left"},
        "tables": [table],
    }
    found = gpu.result({"layer": part}, {"name": "NVIDIA H100"}, dry=False)
    (tmp_path / "gpu.json").write_text(json.dumps(found), encoding="utf-8")
    (tmp_path / "speed.md").write_text("# Speed\n", encoding="utf-8")
    assert report.write_docs(tmp_path, tmp_path) == ["gpu"]
    page = (tmp_path / "speed.md").read_text(encoding="utf-8")
    for words in (
        "## On a GPU",
        "1.00 ± 0.10",
        "NVIDIA H100",
        "RuntimeError: no",
        "no time was left",
    ):
        assert words in page
    found["dry_run"] = True
    (tmp_path / "gpu.json").write_text(json.dumps(found), encoding="utf-8")
    assert report.write_docs(tmp_path, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("section", list(gpu.SECTIONS))
def test_the_dry_run_goes_through_a_whole_section(section, tmp_path):
    wanted = {
        "pallas": "jax",
        "model": "transformers",
        "small": "transformers",
        "experts": "transformers",
    }
    pytest.importorskip({**wanted, "quantised": "torchao"}.get(section, "triton"))
    pytest.importorskip("triton")
    out = tmp_path / "gpu.json"
    done = run("--dry-run", "--only", section, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    part = found["sections"][section]
    assert part["errors"] == {}
    assert all("No module" in why for why in part["skipped"].values()), part["skipped"]
    assert part["tables"] and found["dry_run"]
    text = json.dumps(part["tables"])
    if section == "kernels":
        assert part["figures"]["failed"] == []
    else:  # the base, and flix beside it
        assert "frozen" in text
        assert ("flix" if section in ("small", "experts", "quantised") else "fused") in text
