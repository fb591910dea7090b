"""The torch backend imports torch, and nothing else of its size."""

from __future__ import annotations

import subprocess
import sys

import pytest

OTHERS = ("jax", "flax", "tensorflow", "keras", "transformers", "peft", "datasets")


def test_the_torch_backend_adds_nothing_but_torch():
    pytest.importorskip("torch")
    code = (
        "import sys, torch; before = set(sys.modules); import flix.backends.torch; "
        "added = {m.split('.')[0] for m in set(sys.modules) - before}; "
        f"print(sorted(added & set({OTHERS!r})))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
