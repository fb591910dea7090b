"""What importing the backend imports, and says where its framework is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(*arguments: str, flags: str = "") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_imports_no_other_framework() -> None:
    code = """
import sys
import flix.backends.jax
found = [n for n in ("torch", "tensorflow", "keras", "peft", "transformers") if n in sys.modules]
assert not found, found
print("fine")
"""
    found = run("-c", code)
    assert found.stdout.strip() == "fine", found.stderr


@pytest.mark.parametrize("missing", ["jax", "flax"])
def test_missing_framework_says_what_to_install(missing: str) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
import flix
try:
    import flix.backends.jax
except flix.MissingFrameworkError as error:
    print(error)
"""
    found = run("-c", code)
    assert "the jax backend needs JAX" in found.stdout, found.stderr
    assert 'pip install "flix-peft[jax]"' in found.stdout
