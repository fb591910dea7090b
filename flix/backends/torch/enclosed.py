"""Updates in the kernels of layers whose base map is their own forward (docs/specification.md §5.2).

Nothing is known of such a layer but what its forward gives. So a kernel is written only where a trial shows that the
output then changes by the update, and a quantised layer becomes a plain one only where that one gives what it gave.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flix.backends.torch.around import readable
from flix.core.errors import TargetError

_ROWS = 16


def added(module: nn.Module, path: str, update: Tensor) -> Tensor:
    """The kernel of a plain copy of an enclosed layer, plus an update ``[d_out, d_in]``; the module holds it already.

    Raises:
        TargetError: the layer's kernel cannot be read, or its output does not change by the update.
    """
    weight: Any = getattr(module, "weight", None)
    wanted = tuple(update.shape)
    if (
        not isinstance(weight, nn.Parameter)
        or not readable(weight)
        or tuple(weight.shape) != wanted
    ):
        raise TargetError(_refused(module, path, "its kernel is quantised"))
    x = _probe(weight.shape[1], weight)
    with torch.no_grad():
        before = _run(module, x)
        total = weight.detach().double().cpu() + update
        value = torch.empty_like(weight.detach()).copy_(total)
        module.weight = nn.Parameter(value, requires_grad=weight.requires_grad)
        if before is None or (after := _run(module, x)) is None:
            raise TargetError(
                _refused(module, path, "its forward does not take a batch of vectors")
            )
        change = x.double().cpu() @ (value.detach().double() - weight.detach().double()).cpu().t()
        if not _close(after - before, change, before, weight.dtype):
            raise TargetError(
                _refused(module, path, "its output does not change as its kernel does")
            )
    return value


def plain(module: Any, path: str) -> nn.Linear:
    """A plain linear layer that computes what an enclosed one does.

    Raises:
        TargetError: it is no linear map, as a trial shows.
    """
    d_in, d_out = module.in_features, module.out_features
    like = _like(module)
    with torch.no_grad():
        zero, x = torch.zeros(1, d_in, dtype=like.dtype, device=like.device), _probe(d_in, like)
        bias, wanted = _run(module, zero), _run(module, x)
        if bias is None or wanted is None:
            raise TargetError(
                f"layer {path!r} ({type(module).__name__}) cannot be run on a batch of vectors"
            )
        weight: Any = getattr(module, "weight", None)
        # Torchao's are of classes of their own.
        own = isinstance(weight, Tensor) and type(weight.data) is not Tensor
        if own and tuple(weight.shape) == (d_out, d_in):
            kernel = weight.dequantize().double().cpu()
        else:  # the map of each unit vector is a column of the kernel
            columns = [_run(module, _units(start, d_in, like)) for start in range(0, d_in, 1024)]
            kernel = (torch.cat(columns) - bias).t()  # type: ignore[arg-type]
        if not _close(wanted, x.double().cpu() @ kernel.t() + bias, wanted, like.dtype):
            raise TargetError(
                f"layer {path!r} ({type(module).__name__}) is not a linear map of its input, or "
                f"not one that can be read from it, so it cannot become a plain layer. Leave it "
                f"out of target_modules to merge the rest"
            )
        has_bias = getattr(module, "bias", None) is not None or bool(bias.any())
        made = nn.Linear(d_in, d_out, has_bias, device=like.device, dtype=like.dtype)
        made.weight.copy_(kernel)
        if has_bias:
            made.bias.copy_(bias[0])
    made.requires_grad_(False)
    return made.train(module.training)


def _like(module: Any) -> Tensor:
    """A tensor of the dtype and on the device that a quantised layer computes in."""
    weight = getattr(module, "weight", None)
    device = next(
        (v.device for v in (*module.parameters(), *module.buffers())), torch.device("cpu")
    )
    known = [getattr(module, "compute_dtype", None), getattr(weight, "dtype", None)]
    known += [v.dtype for v in (*module.parameters(), *module.buffers())]
    wide = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return torch.empty(0, dtype=next((d for d in known if d in wide), torch.float32), device=device)


def _probe(size: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(_ROWS, size, generator=generator, dtype=torch.float64)
    return made.to(like.device, like.dtype)


def _units(start: int, size: int, like: Tensor) -> Tensor:
    count = min(1024, size - start)
    made = torch.zeros(count, size, dtype=like.dtype, device=like.device)
    made[range(count), range(start, start + count)] = 1
    return made


def _run(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a layer gives for vectors, in float64 on the host; None where it cannot be run so."""
    try:
        y = module(x)
    except Exception:
        return None
    return y.double().cpu() if isinstance(y, Tensor) and y.shape[:1] == x.shape[:1] else None


def _close(got: Tensor, wanted: Tensor, size: Tensor, dtype: torch.dtype) -> bool:
    """Whether values are the same up to the rounding of a product in a dtype whose results are of some size."""
    off = 16 * torch.finfo(dtype).eps * size.abs().max() + 0.02 * wanted.abs().max()
    return bool((got - wanted).abs().max() <= off)


def _refused(module: nn.Module, path: str, reason: str) -> str:
    return (
        f"layer {path!r} ({type(module).__name__}) cannot be merged: {reason}; "
        "merge(model, row, dequantize=True) turns it into a plain linear layer"
    )
