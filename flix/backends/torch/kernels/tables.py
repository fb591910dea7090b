"""Tables of addresses: how a kernel finds the bank, whose features are tensors of their own.

A table depends on nothing but the addresses and ranks of the tensors, so it is made once and kept: in a steady state
no bytes are uploaded, and a captured CUDA graph finds the table it was captured with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KEPT = 4096  # tables; a table of 64 bank rows is 2 KB


@dataclass(frozen=True)
class Table:
    """A layer's bank for kernels: int64 tensors by bank row u.

    Attributes:
        at_a, at_b: addresses of row u of A and of B transposed.
        ranks: the rank of u's feature.
        first: the first row of u's feature.
        rows: the number of bank rows.
        dtype: of the tensors.
        widest: the largest rank.
        held: what must live as long as the table.
    """

    at_a: Tensor
    at_b: Tensor
    ranks: Tensor
    first: Tensor
    rows: int
    dtype: torch.dtype
    widest: int
    held: Any


_tables: OrderedDict[Any, Table] = OrderedDict()
_captured: list[Table] = []


def upload(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """An array on a device, without waiting for what the device has still to do."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _table(
    addresses: Sequence[int],
    ranks: Sequence[int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    device: Any,
) -> Table:
    half = len(ranks)
    counts = np.asarray(ranks, dtype=np.int64)
    places = np.asarray(addresses, dtype=np.int64)
    start = np.cumsum(counts) - counts
    first = np.repeat(start, counts)
    within = np.arange(int(counts.sum()), dtype=np.int64) - first
    values = np.stack(
        [
            np.repeat(places[:half], counts) + within * sizes[0] * dtype.itemsize,
            np.repeat(places[half:], counts) + within * sizes[1] * dtype.itemsize,
            np.repeat(counts, counts),
            first,
        ]
    )
    # Each row of the table begins aligned alike, which kernels are compiled for.
    host = torch.from_numpy(np.pad(values, ((0, 0), (0, values.shape[1] % 2))))
    if device.type == "cuda":
        host = host.pin_memory()
    table = host.to(device, non_blocking=True)
    at_a, at_b, own, starts = table.unbind(0)
    return Table(at_a, at_b, own, starts, len(first), dtype, max(ranks), host)


def bank_table(a: Sequence[Tensor], b: Sequence[Tensor], device: torch.device) -> Table:
    """The table of a bank: A ``[r, d_in]`` and B transposed ``[r, d_out]`` of each feature.

    Tensors that are not contiguous, or of another dtype than the first, are copied for the time of the call.
    """
    dtype = a[0].dtype
    params = [
        p if p.dtype == dtype and p.is_contiguous() else p.to(dtype).contiguous() for p in (*a, *b)
    ]
    addresses = tuple(p.data_ptr() for p in params)
    ranks = tuple(p.shape[0] for p in a)
    sizes = a[0].shape[1], b[0].shape[1]
    key = (device, dtype, sizes, addresses, ranks)
    found = _tables.get(key)
    if any(p is not q for p, q in zip(params, (*a, *b), strict=True)):
        made = _table(addresses, ranks, sizes, dtype, device)
        found = replace(made, held=(made.held, params))
    elif found is None:
        found = _tables[key] = _table(addresses, ranks, sizes, dtype, device)
        while len(_tables) > _KEPT:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(found)  # the graph will read it at every replay
    return found
