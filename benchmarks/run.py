"""The whole suite: layers, whole models and growth, in every framework; JSON, plots, and the page docs/speed.md.

    python -m benchmarks.run                       # everything, about 20 minutes on one core
    python -m benchmarks.run --only layer,model    # or tenants, scale, or single parts such as model-t5
    python -m benchmarks.run --smoke               # tiny sizes, guards on, nothing written to docs: about a minute

Parts run one after another, each in a process of its own, so that frameworks, threads and memory do not mix. In the
smoke run the parts of one framework share a process and the frameworks run side by side; its figures mean nothing, but
a guard that fails fails it. On a busy machine, ``chrt -r 1`` before the command keeps other work off the core.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import PARTS, ROOT, bars_table, read_results, write_docs

SUITES = {
    "layer-torch": "benchmarks.layer.torch_layer:suite",
    "layer-jax": "benchmarks.layer.jax_layer:suite",
    "layer-tensorflow": "benchmarks.layer.tensorflow_layer:suite",
    "model-t5": "benchmarks.model.torch_model:t5",
    "model-gpt2": "benchmarks.model.torch_model:gpt2",
    "model-int8": "benchmarks.model.torch_quantised:suite",
    "tenants-t5": "benchmarks.model.tenants:t5",
    "tenants-gpt2": "benchmarks.model.tenants:gpt2",
    "model-jax": "benchmarks.model.jax_model:suite",
    "model-keras": "benchmarks.model.keras_model:suite",
    "scale-layer": "benchmarks.scale.layer_growth:suite",
    "scale-features": "benchmarks.scale.many_features:suite",
    "scale-paging": "benchmarks.scale.paging:suite",
}
SMOKE_PROCESSES = (
    ("model-t5", "model-gpt2", "model-int8", "tenants-t5", "tenants-gpt2"),
    ("layer-torch", "scale-layer", "scale-features", "scale-paging"),
    ("layer-jax", "model-jax"),
    ("layer-tensorflow", "model-keras"),
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
}


def chosen(only: str) -> list[str]:
    """The parts that a list of names stands for: parts, or the beginnings of their names.

    Raises:
        SystemExit: a name that stands for nothing.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    found = [part for part in PARTS if any(part == n or part.startswith(n + "-") for n in names)]
    for name in names:
        if not any(part == name or part.startswith(name + "-") for part in PARTS):
            raise SystemExit(f"no part {name!r}; there are {', '.join(PARTS)}")
    return found if names else list(PARTS)


def measure(parts: list[str], out: Path, smoke: bool) -> None:
    """Run parts in this process, and write each one's JSON."""
    for part in parts:
        module, _, name = SUITES[part].partition(":")
        start = time.perf_counter()
        result = getattr(importlib.import_module(module), name)(smoke)
        seconds = time.perf_counter() - start
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**result.to_dict(), "seconds": round(seconds, 1)}, indent=1)
        (out / f"{part}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{part}: {seconds:.0f} s", flush=True)


def start(parts: list[str], out: Path, smoke: bool) -> subprocess.Popen[bytes]:
    """A process that runs parts; in the smoke run it shares the cores and its errors wait for it to end."""
    worker = ["-m", "benchmarks.run", "--worker", ",".join(parts), "--out", str(out)]
    command = [sys.executable, *worker]
    environment = {**os.environ, **ENVIRONMENT}
    if smoke:
        command.append("--smoke")
        environment["FLIX_BENCH_UNPINNED"] = "1"
        # Compiling takes longer than all that is run.
        environment["XLA_FLAGS"] = (
            "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true"
        )
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def main() -> None:
    """Parse the command line, run, report.

    Raises:
        SystemExit: a part failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a check that all runs")
    parser.add_argument(
        "--only", default="", help="layer, model, tenants, scale, or parts, with commas"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument(
        "--docs", type=Path, help="where speed.md is; default: docs (smoke: nowhere)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out / "smoke" if options.smoke and not options.worker else options.out
    if options.worker:
        measure(options.worker.split(","), out, options.smoke)
        return
    parts, begun = chosen(options.only), time.perf_counter()
    if options.smoke:
        shared = [[p for p in group if p in parts] for group in SMOKE_PROCESSES]
        running = [(group, start(group, out, True)) for group in shared if group]
        failed = [part for group, process in running if process.wait() for part in group]
    else:
        failed = [part for part in parts if start([part], out, False).wait()]
    docs = options.docs or (None if options.smoke else ROOT / "docs")
    if docs is not None:
        write_docs(out, docs)
    if not options.smoke:
        print(bars_table(read_results(out)))
    print(f"{time.perf_counter() - begun:.0f} s in all")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
