"""Which strategy a layer runs, from shapes, device and dtype alone: no value of a tensor, no state."""

from __future__ import annotations

import importlib.util
import os

import torch

from flix.core.strategy.decide import Facts, decide, triton_lacks

# Looked up once, without importing Triton: compilers trace the code below as constants.
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

# By name, since compilers cannot trace a dtype as text.
_NAMES = {getattr(torch, name): name for name in ("float16", "bfloat16", "float32", "float64")}


def strategy_for(
    asked: str, x: torch.Tensor, *, rows: int, union: int | None, kept: int = 0
) -> str:
    """The strategy that a layer runs on x ``[N, S, d_in]``.

    Args:
        asked: what the user asked for.
        x: the input.
        rows: the most rank rows that one example uses, R.
        union: rank rows that the batch uses; None where ids are not known on the host (in compiled graphs).
        kept: of how many compositions copies would be kept between calls; 0 if none are.

    Raises:
        ConfigError: ``"fused"`` where it cannot run.
    """
    device = x.device.type
    if asked == "masked" and device != "cpu":
        # Rows that masked mixes must be told apart by their values, and the host would wait for the device to see them.
        asked = "gather"
    dtype = _NAMES.get(x.dtype, str(x.dtype))
    lacks = triton_lacks(device, dtype, triton=TRITON, interpreted=INTERPRETED)
    facts = Facts(x.shape[0], x.shape[1], rows, union, f"torch-{device}", kept, lacks)
    return decide(asked, facts).strategy


def require_triton(strategy: str) -> None:
    """Refuse ``"fused"`` where Triton is missing, when a layer is made; its device may still change.

    Raises:
        ConfigError: Triton is not installed.
    """
    lacks = triton_lacks("cuda", "float32", triton=TRITON, interpreted=False)
    decide(strategy, Facts(1, 1, 1, None, "torch-cpu", lacks=lacks))
