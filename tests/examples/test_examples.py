"""Every example runs, offline, from an empty folder, and is short enough to read."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
# Other tests run them: one makes files for a configuration, one starts Ray.
LONGER = {"make_tiny.py", "ray_train.py"}
NEEDS = {
    "jax": ("jax", "flax"),
    "keras": ("tensorflow",),
    "onnx": ("torch", "onnxruntime", "onnxscript"),
}
# What is printed when all went well, and how often.
SAYS = {
    "generate.py": {"beams: 6 sequences for 3 rows": 1, "pipeline: 3 answers": 1},
    "onnx_export.py": {"largest difference": 3},
    "tenants_policy_gradient.py": {" steps, reward ": 3},
    "tenants_supervised.py": {" steps, loss ": 5},
    "serving.py": {"to serve with vLLM: vllm serve": 1},
}


def test_examples_are_short():
    lines = {name: len((ROOT / "examples" / name).read_text().splitlines()) for name in EXAMPLES}
    assert {
        name: n for name, n in lines.items() if n > 60 and name not in LONGER - {"ray_train.py"}
    } == {}


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in LONGER])
def test_example(name, tmp_path):
    for module in NEEDS.get(name.removesuffix(".py").split("_")[0], ("torch", "transformers")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.strip(), "an example shows something"
    said = SAYS.get(name, {})
    assert {words: found.stdout.count(words) for words in said} == said
