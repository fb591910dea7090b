"""flix on one CUDA device, in at most eight minutes, from a checkout, without network and without set-up.

    python3 -m benchmarks.gpu [--out benchmarks/out/gpu.json] [--only kernels,layer] [--dry-run]

Every section runs in a process of its own with a share of the time (an illegal access to memory ends a process); what
it does not use is the next ones'. Errors are written down, not raised. The file is written anew after every section,
and docs/speed.md takes it (``python -m benchmarks.report``). A dry run takes tiny sizes on the CPU: Triton and Pallas
interpret the kernels, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Result, environment
from benchmarks.gpu.record import Record
from benchmarks.report import ROOT

# Seconds of each section; together less than eight minutes.
SECTIONS = {
    "kernels": 70,
    "layer": 80,
    "model": 75,
    "small": 40,
    "experts": 60,
    "quantised": 55,
    "decoding": 30,
    "pallas": 50,
}
INTERPRETED = 6
"""How much longer a dry run may take: kernels are interpreted, on whatever machine this is."""
STOPPING = 12
"""Seconds before its end in which a section begins nothing new."""
PACKAGES = (
    *("torch", "triton", "jax", "jaxlib", "flax", "transformers", "peft", "numpy"),
    *("torchao", "bitsandbytes"),
)
ALWAYS = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
DRY = {
    "TRITON_INTERPRET": "1",
    "FLIX_PALLAS_INTERPRET": "gpu",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


def device(dry: bool) -> dict[str, Any]:
    """The card, asked in a process of its own, so that this one holds nothing on it."""
    code = (
        "import json, torch; p = torch.cuda.get_device_properties(0); print(json.dumps({'name': p.name, "
        "'GiB': round(p.total_memory / 2**30, 1), 'multiprocessors': p.multi_processor_count, "
        "'capability': f'{p.major}.{p.minor}', 'cuda': torch.version.cuda}))"
    )
    if dry:
        return {"name": "none: a dry run on the CPU"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            "there is no CUDA device that torch sees; --dry-run tries everything on the CPU\n"
            + done.stderr.strip()[-500:]
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def section(name: str, seconds: float, dry: bool) -> dict[str, Any]:
    """Run one section in a process of its own; an end before its time is an error among its errors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "section.json")
        words = ["--section", name, "--out", str(path), "--seconds", str(seconds - STOPPING)]
        command = [sys.executable, "-m", "benchmarks.gpu", *words, *(["--dry-run"] if dry else [])]
        settings = {**os.environ, **ALWAYS, **(DRY if dry else {})}
        begun, why = time.monotonic(), None
        try:
            done = subprocess.run(command, cwd=ROOT, env=settings, timeout=seconds)
            if done.returncode:
                why = f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {seconds:.0f} s"
        found: dict[str, Any] = {"figures": {}, "errors": {}, "skipped": {}, "tables": []}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
        if why is not None:
            found["errors"]["the section"] = why
        found["seconds"] = round(time.monotonic() - begun, 1)
        return found


def result(found: dict[str, Any], card: dict[str, Any], dry: bool) -> dict[str, Any]:
    """All sections as a part of the benchmark's report, and as they are."""
    made = Result("gpu", "On a GPU", environment=environment(PACKAGES))
    made.environment["gpu"] = card["name"]
    made.method = (
        "`make gpu`. Candidates take turns; a figure is a median with half the distance between the quartiles, a ratio that "
        "of the times in one round. Every strategy was held to the definition in float64 first."
    )
    data = made.to_dict()
    data["tables"] = [table for part in found.values() for table in part["tables"]]
    errors = [
        [n, what, text.splitlines()[-1]]
        for n, p in found.items()
        for what, text in p["errors"].items()
    ]
    skipped = [[n, what, why] for n, p in found.items() for what, why in p["skipped"].items()]
    if errors or skipped:
        columns = ["section", "what", "why"]
        rows = errors + skipped
        data["tables"].append(
            {"title": "Not measured", "columns": columns, "rows": rows, "note": ""}
        )
    return {**data, "device": card, "dry_run": dry, "sections": found}


def main() -> None:
    """Parse the command line and run the sections, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "gpu.json")
    parser.add_argument("--only", default="", help=", ".join(SECTIONS))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        record = Record(options.out, options.seconds, options.dry_run)
        importlib.import_module(f"benchmarks.gpu.{options.section}").run(record)
        return
    names = [name.strip() for name in options.only.split(",") if name.strip()] or list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        raise SystemExit(f"no section {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    card = device(options.dry_run)
    print(f"{card['name']}: {', '.join(names)}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    begun, allowed = time.monotonic(), 0.0
    for name in names:
        allowed += SECTIONS[name] * (INTERPRETED if options.dry_run else 1)
        found[name] = section(name, allowed - (time.monotonic() - begun), options.dry_run)
        text = json.dumps(result(found, card, options.dry_run), indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")
        part = found[name]
        print(
            f"{name}: {part['seconds']:.0f} s, {len(part['tables'])} tables, {len(part['errors'])} errors, "
            f"{len(part['skipped'])} skipped",
            flush=True,
        )
    print(f"{time.monotonic() - begun:.0f} s in all; written to {options.out}")


if __name__ == "__main__":
    main()
