"""Commands that run: ``train``, ``evaluate``, ``quickstart``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import typer

from flix.cli.console import make_reporter, quiet, show, show_json, show_table
from flix.training.errors import RunError, missing_extra


def train_config(config: Path, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Train, and say what came out."""
    from flix.training.reading import read_settings

    settings = read_settings(config)
    from flix.training.run import train

    quiet()
    result = train(settings, resume=resume, overwrite=overwrite, reporter=make_reporter(as_json))
    if as_json:
        show_json({"output": str(result.output), "adapter": str(result.adapter), **result.metrics})
        return
    if "evaluation" in result.metrics:
        show_scores(result.metrics["evaluation"])
    losses = result.metrics["losses"]
    last = f", last loss {losses[-1]['loss']:.3f}" if losses else ""
    show(f"{result.metrics['steps']} steps in {result.metrics['seconds']:.1f} s{last}")
    show(f"adapter: {result.adapter}")


def evaluate_adapter(config: Path, adapter: Path, out: Path | None, as_json: bool) -> None:
    """Evaluate by generation."""
    from flix.training.reading import read_settings

    settings = read_settings(config)
    if out is not None and (out.is_dir() or (out.parent.exists() and not out.parent.is_dir())):
        raise RunError(f"--out: {str(out)!r} cannot be a file")
    from flix.training.evaluation import evaluate

    quiet()
    result = evaluate(settings, adapter, reporter=make_reporter(as_json))
    if out is not None:
        import json

        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        out.write_text(text, encoding="utf-8")
    if as_json:
        show_json({"adapter": str(adapter), **result})
    else:
        show_scores(result)


def show_scores(result: dict[str, Any]) -> None:
    """Results by cell, then the averages."""
    rows = [
        [c["cell"], "seen" if c["seen"] else "held out", c["rows"], c["exact_match"], c["chrf"]]
        for c in sorted(result["cells"], key=lambda c: not c["seen"])
    ]
    for name, key in (("average, seen", "seen"), ("average, held out", "held_out")):
        if (mean := result[key]) is not None:
            cells = f"{mean['cells']} cell{'s' if mean['cells'] != 1 else ''}"
            rows.append([name, cells, mean["rows"], mean["exact_match"], mean["chrf"]])
    show_table(["combination", "trained", "rows", "exact match %", "chrF"], rows)


def run_quickstart(
    seeds: int, fast: bool, as_json: bool, out: Path | None, steps: int | None
) -> None:
    """Hand over to the quickstart."""
    try:
        module = importlib.import_module("flix.quickstart.run")
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "flix":
            raise
        raise missing_extra("the quickstart", "quickstart", error) from None
    code = module.main(seeds=seeds, fast=fast, as_json=as_json, out=out, steps=steps)
    raise typer.Exit(int(code or 0))
