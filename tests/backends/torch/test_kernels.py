"""What surrounds the fused kernels: the choice of a strategy, compiled models, and the kernels' compilation."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from flix import ConfigError  # noqa: E402
from flix.backends.torch import FlixLinear, adapt  # noqa: E402
from flix.backends.torch.kernels import choice  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import live_pairs, randomize, routing  # noqa: E402

HERE = Path(__file__).parent


def _subprocess(arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton")
    arguments = ["-m", "pytest", "-q", "-p", "no:xdist", "-x", str(HERE / "test_fused.py")]
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
        ["-m", "tests.backends.torch.compile_kernels", shape], TRITON_INTERPRET="0"
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _strategy(asked="auto", device="cpu", dtype=torch.bfloat16, examples=16, length=512, **known):
    x = torch.empty(examples, length, 8, device="meta", dtype=dtype)
    x = types.SimpleNamespace(shape=x.shape, device=torch.device(device), dtype=x.dtype)
    return choice.strategy_for(asked, x, **{"rows": 16, "union": 64, **known})


def test_auto_takes_no_kernels_that_nobody_measured(monkeypatch):
    monkeypatch.setattr(choice, "TRITON", True)
    for device in ("cpu", "cuda"):
        assert _strategy(device=device) == _strategy(device=device, union=None) == "gather"
        assert _strategy(device=device, length=1) == "masked"
        assert _strategy(device=device, length=1, examples=4096, union=9999) == "gather"
        assert _strategy(device=device, examples=1) == "single"
    assert _strategy("masked") == "masked"
    assert _strategy("fused", device="cuda") == "fused"


def test_fused_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(choice, "INTERPRETED", False)
    monkeypatch.setattr(choice, "TRITON", False)
    with pytest.raises(
        ConfigError, match="Triton, which is not installed: pip install triton; or use"
    ):
        _strategy("fused", device="cuda")
    monkeypatch.setattr(choice, "TRITON", True)
    with pytest.raises(
        ConfigError, match=r"a CUDA device, but the input is on 'cpu'.*or use 'auto'"
    ):
        _strategy("fused")
    with pytest.raises(ConfigError, match="got float64"):
        _strategy("fused", device="cuda", dtype=torch.float64)
    monkeypatch.setattr(choice, "INTERPRETED", True)
    assert _strategy("fused") == "fused"
    assert _strategy() == "gather"


def test_fused_without_triton_is_refused_when_a_model_is_adapted(monkeypatch):
    monkeypatch.setattr(choice, "TRITON", False)
    with pytest.raises(ConfigError, match="pip install triton"):
        adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), config(), strategy="fused")
    with pytest.raises(ConfigError, match="pip install triton"):
        FlixLinear(4, 4, config=config(), strategy="fused")


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


def _compiled(strategy="auto"):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = adapt(torch.nn.Sequential(torch.nn.Linear(6, 5)), config(), strategy=strategy)
    randomize(model)
    return model, torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_compiled_models_do_not_touch_absent_features(strategy):
    model, compiled = _compiled(strategy)
    ids, weights = routing([{"language": "hau", "task": "pos"}, {"task": "pos"}])
    with torch.no_grad():
        for name, parameter in live_pairs(model).items():
            if not name.endswith((".hau", ".pos")):
                parameter.fill_(float("nan"))
    x = torch.randn(2, 9, 6)
    y = compiled(x, flix_features=ids, flix_weights=weights)
    assert_close(y, model(x, flix_features=ids, flix_weights=weights), dtype="float32")
    y.sum().backward()
    for name, parameter in live_pairs(model).items():
        assert parameter.grad.isfinite().all()
        assert bool(parameter.grad.any()) == name.endswith((".hau", ".pos")), name


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_ids_of_no_feature_give_nan_in_compiled_models(kind):
    torch._dynamo.reset()
    layer = torch.nn.Linear(6, 5) if kind == "linear" else torch.nn.Embedding(6, 5)
    model = adapt(torch.nn.Sequential(layer), config(target_modules=["0"]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 6) if kind == "linear" else torch.ones(3, 4, dtype=torch.int64)
    for bad in (6, 9, -2):
        y = compiled(x, flix_features=torch.tensor([[0, 1], [0, bad], [-1, -1]]))
        assert y.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert y[[0, 2]].isfinite().all()


def test_single_in_a_compiled_model_refuses_rows_that_differ():
    _, compiled = _compiled("single")
    with pytest.raises(ConfigError, match="row 1 differs from row 0"):
        compiled(torch.zeros(2, 3, 6), flix_features=torch.tensor([[0], [5]]))
