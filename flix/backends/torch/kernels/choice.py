"""Which strategy a layer runs, from shapes, device and dtype alone: no value of a tensor, no state."""

from __future__ import annotations

import importlib.util
import os

import torch

from flix.core.errors import ConfigError
from flix.core.strategy.decide import Facts, decide

# Looked up once, without importing Triton: compilers trace the code below as constants.
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

DTYPES = ("float16", "bfloat16", "float32")


_NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, as messages give it."""
    return _NAMES.get(dtype, str(dtype))


def fused_lacks(device: str, dtype: str, *, triton: bool, interpreted: bool) -> str | None:
    """What the fused strategy lacks on this device for this dtype; None where it runs."""
    if not triton:
        return "Triton, which is not installed: pip install triton"
    if device != "cuda" and not (interpreted and device == "cpu"):
        return (
            f"a CUDA device, but the input is on {device!r} (Triton's interpreter, switched on by "
            "TRITON_INTERPRET=1, serves to test on a CPU)"
        )
    if dtype not in DTYPES:
        return f"an input of {', '.join(DTYPES)}, got {dtype}"
    return None


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
    lacks = fused_lacks(device, dtype_name(x.dtype), triton=TRITON, interpreted=INTERPRETED)
    facts = Facts(x.shape[0], x.shape[1], rows, union, f"torch-{device}", kept, lacks)
    return decide(asked, facts).strategy


def require_triton(strategy: str) -> None:
    """Refuse ``"fused"`` where Triton is missing, when a layer is made; its device may still change.

    Raises:
        ConfigError: Triton is not installed.
    """
    if strategy == "fused" and not TRITON:
        raise ConfigError(
            "strategy 'fused' needs Triton, which is not installed: pip install triton; or use 'auto', "
            "'gather' or 'masked'"
        )
