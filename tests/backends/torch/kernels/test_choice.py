"""Which strategy a layer runs, and what the fused one lacks where it cannot run."""

from __future__ import annotations

import types

import pytest

torch = pytest.importorskip("torch")

from flix import ConfigError  # noqa: E402
from flix.backends.torch import FlixLinear, adapt  # noqa: E402
from flix.backends.torch.kernels import choice  # noqa: E402
from tests.helpers.registry import config  # noqa: E402


def _strategy(asked="auto", device="cpu", dtype=torch.bfloat16, examples=16, length=512, **known):
    x = torch.empty(examples, length, 8, device="meta", dtype=dtype)
    x = types.SimpleNamespace(shape=x.shape, device=torch.device(device), dtype=x.dtype)
    return choice.strategy_for(asked, x, **{"rows": 16, "union": 64, **known})


def test_auto_on_a_cpu(monkeypatch):
    monkeypatch.setattr(choice, "TRITON", True)
    assert _strategy() == _strategy(union=None) == "gather"
    assert _strategy(length=1) == "masked"
    assert _strategy(length=1, examples=4096, union=9999) == "gather"
    assert _strategy(examples=1) == "single"
    assert _strategy("masked") == "masked"


def test_auto_on_a_cuda_device_takes_the_kernels_where_they_run(monkeypatch):
    monkeypatch.setattr(choice, "TRITON", True)
    for known in ({}, {"union": None}, {"length": 1}, {"examples": 1}):
        assert _strategy(device="cuda", **known) == "fused"
    assert _strategy(device="cuda", dtype=torch.float64) == "gather"
    assert _strategy(device="cuda", length=1, kept=16) == "gather"
    monkeypatch.setattr(choice, "TRITON", False)
    assert _strategy(device="cuda") == _strategy(device="cuda", length=1) == "gather"
    assert _strategy(device="cuda", examples=1) == "single"


def test_masked_on_a_cuda_device_is_gather():
    """To see whether a broken value reached other rows, the host would wait for the device in every layer."""
    assert _strategy("masked", device="cuda") == "gather"


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
