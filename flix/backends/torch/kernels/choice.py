"""Which strategy a layer runs, from shapes, device and dtype alone: no value of a tensor, no state."""

from __future__ import annotations

import importlib.util
import os

import torch

from flix.core.config.layout import check_strategy, choose_strategy
from flix.core.errors import ConfigError
from flix.core.strategy.decide import Facts, picked

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
    """A dtype's name, as ``plan_strategy`` takes it."""
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


def plan_strategy(
    strategy: str,
    *,
    examples: int,
    tokens: int,
    union: int | None,
    rows_per_example: int,
    d_in: int,
    d_out: int,
    device: str,
    dtype: str,
    stacked: bool = False,
    triton: bool = TRITON,
    interpreted: bool = INTERPRETED,
) -> str:
    """The strategy to run.

    Args:
        strategy: what the user asked for.
        examples: rows of the routing, N.
        tokens: positions that share one row of the routing, S.
        union: bank rows that the batch uses; None where ids are not known on the host (in compiled graphs).
        rows_per_example: the most bank rows that one example uses, R.
        d_in, d_out: the layer's sizes.
        device: the device's type.
        dtype: of the computation, as ``"bfloat16"``.
        stacked: whether the layer keeps the union stacked between calls.
        triton: whether Triton is installed.
        interpreted: whether Triton interprets its kernels on the CPU.

    Raises:
        ConfigError: no such strategy, or ``"fused"`` where it cannot run.
    """
    if strategy not in ("auto", "fused"):
        check_strategy(strategy)
        return strategy
    lacks = fused_lacks(device, dtype, triton=triton, interpreted=interpreted)
    if strategy == "fused":
        if lacks is not None:
            raise ConfigError(
                f"strategy 'fused' needs {lacks}; or use 'auto', 'gather' or 'masked'"
            )
        return strategy
    # The interpreter is a test's means: auto never picks it.
    fused = lacks is None and device == "cuda"
    if union is None:
        # In a graph: sizes may be symbols, which costs would tie it to.
        return "fused" if fused else choose_strategy(strategy, examples=examples, tokens=tokens)
    where = f"torch-{device}"
    facts = Facts(examples, tokens, rows_per_example, union, d_in, d_out, where, fused, stacked)
    return picked(strategy, facts)


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
