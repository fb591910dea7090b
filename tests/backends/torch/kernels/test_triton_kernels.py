"""The kernels run in Triton's interpreter, compile for a chip, and are imported only then: each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

# What needs the kernels, and asks for the interpreter.
MODULES = ("test_launch.py", "test_operators.py", "test_routes.py", "test_tables.py")
HERE = Path(__file__).parent


def _subprocess(arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[3],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton")
    arguments = ["-m", "pytest", "-q", "-p", "no:xdist", "-x"]
    arguments += [str(HERE / module) for module in MODULES]
    result = _subprocess(arguments, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and " skipped" not in result.stdout


@pytest.mark.parametrize("shape", ["decode", pytest.param("train", marks=pytest.mark.slow)])
def test_the_kernels_compile_for_hopper(shape):
    """No GPU is needed for that; shared memory and registers are held to what the chip has."""
    pytest.importorskip("triton")
    if torch.version.hip is not None or sys.platform != "linux":
        pytest.skip("needs Triton's CUDA tools")
    result = _subprocess(
        ["-m", "tests.backends.torch.kernels.compile_kernels", shape], TRITON_INTERPRET="0"
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_triton_is_not_imported_before_a_fused_layer_runs():
    code = (
        "import sys, torch, flix.backends.torch, flix.backends.torch.layers; "
        "print('triton.language' in sys.modules or 'flix.backends.torch.kernels.launch' in sys.modules)"
    )
    result = _subprocess(["-c", "import torch, sys; print('triton.language' in sys.modules)"])
    assert result.stdout.strip() == "False", (
        "torch imports Triton by itself; this test tells nothing"
    )
    assert _subprocess(["-c", code]).stdout.strip() == "False"
