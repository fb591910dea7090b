"""Keras on JAX and on torch, each in a process of its own; numbers and files beside those of Keras on TensorFlow."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import flix
from tests.helpers.processes import ROOT


def run(*args, backend, **environment):
    """Run Python with another Keras backend; its standard output."""
    env = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *args], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """What Keras on TensorFlow gives: an adapter, a model's file, its outputs, and where training ends."""
    import keras

    from flix.backends.tensorflow import named_pairs, save
    from tests.backends.keras.models import Y, adapted

    folder = tmp_path_factory.mktemp("exchanged")
    model, given = adapted(whole=True)
    save(model, folder / "adapter")
    model.save(folder / "whole.keras")
    start, small = adapted(randomized=False)
    start.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1), "mse")
    start.fit(small, Y, epochs=3, batch_size=3, shuffle=False, verbose=0)
    np.savez(folder / "numbers.npz", y=np.asarray(model(given)), **named_pairs(start))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_all_that_holds_on_another_backend(backend, exchanged):
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    checks = [
        str(path.relative_to(ROOT)) for path in sorted(Path(__file__).parent.glob("checks*.py"))
    ]
    out = run("-m", "pytest", "-q", *checks, backend=backend, FLIX_EXCHANGED=str(exchanged))
    assert " passed" in out and "failed" not in out


def test_several_devices_give_the_numbers_of_one():
    pytest.importorskip("jax")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    out = run("-m", "tests.backends.keras.distribution_worker", backend="jax", **flags)
    assert out.strip().endswith("the same on 1, 4 and 2 x 2 devices")


def test_keras_on_a_backend_that_flix_has_no_engine_for_is_refused():
    code = "import flix.backends.keras"
    env = {**os.environ, "KERAS_BACKEND": "numpy"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode
        and "ConfigError" in done.stderr
        and "tensorflow, jax or torch" in done.stderr
    )


def test_on_tensorflow_it_is_the_tensorflow_backend():
    from flix.backends import keras as neutral
    from flix.backends import tensorflow as own

    assert {*neutral.__all__} == {*own.__all__}
    for name in ("FlixModel", "FlixDense", "keep_absent", "primitives", "route"):
        assert getattr(neutral, name) is getattr(own, name)
    assert issubclass(flix.ConfigError, ValueError)
