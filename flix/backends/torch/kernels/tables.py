"""Tables of addresses: how a kernel finds the bank, whose features are tensors of their own.

A table depends on nothing but the addresses and ranks of the tensors, so it is made once and kept: in a steady state
no bytes are uploaded, and a captured CUDA graph finds the table it was captured with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from flix.backends.torch.parameters import InForce
from flix.core.adapter.flat import FlatLayout
from flix.core.config.layout import LayerLayout
from flix.core.errors import ConfigError
from flix.core.strategy.union import bank_rows

_KEPT = 4096  # tables; a table of 64 bank rows is 2 KB
_BATCHES = 64  # what is kept of a model's layers, each time for other features


class Table(NamedTuple):
    """A layer's bank for kernels: int64 tensors by bank row u.

    Attributes:
        at: addresses of row u of A, and of B transposed.
        ranks: the rank of u's feature.
        first: the first row of u's feature.
        rows: the number of bank rows.
        dtype: of the tensors.
        widest: the largest rank.
        held: what must live as long as the table.
    """

    at: tuple[Tensor, Tensor]
    ranks: Tensor
    first: Tensor
    rows: int
    dtype: torch.dtype
    widest: int
    held: Any = None


Made = TypeVar("Made")

_tables: OrderedDict[Any, Table] = OrderedDict()
_of_layouts: WeakKeyDictionary[FlatLayout, OrderedDict[Any, dict[int, Table]]] = WeakKeyDictionary()
# Those that CUDA graphs read at every replay, by the memory they point into: a graph is of no use after that is freed.
_captured: WeakKeyDictionary[torch.UntypedStorage, dict[Any, Any]] = WeakKeyDictionary()


def upload(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """An array on a device, without waiting for what the device has still to do."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _table(
    params: Sequence[Tensor], ranks: tuple[int, ...], sizes: tuple[int, int], device: torch.device
) -> Table:
    dtype = params[0].dtype
    first, own, within = bank_rows(ranks)
    addresses = np.asarray([p.data_ptr() for p in params], dtype=np.int64).reshape(2, -1)
    strides = np.asarray(sizes)[:, None] * dtype.itemsize
    values = np.stack([*(np.repeat(addresses, ranks, axis=1) + within * strides), own, first])
    at_a, at_b, of, start = upload(_even(values), device).unbind(0)
    return Table((at_a, at_b), of, start, len(own), dtype, max(ranks))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def bank_table(a: Sequence[Tensor], b: Sequence[Tensor], device: torch.device) -> Table:
    """The table of a bank: A ``[r, d_in]`` and B transposed ``[r, d_out]`` of each feature.

    Tensors that are not contiguous, or of another dtype than the first, are copied for the time of the call.

    Raises:
        ConfigError: a CUDA graph is being captured, and the table is not there yet.
    """
    given, dtype = (*a, *b), a[0].dtype
    params = [
        p if p.dtype == dtype and p.is_contiguous() else p.to(dtype).contiguous() for p in given
    ]
    ranks = tuple(p.shape[0] for p in a)
    sizes = a[0].shape[1], b[0].shape[1]
    if any(p is not q for p, q in zip(params, given, strict=True)):
        if _capturing(device):
            raise _unprepared()
        return _table(params, ranks, sizes, device)._replace(held=params)
    key = (device, dtype, sizes, ranks, tuple(p.data_ptr() for p in params))
    return _kept(_tables, key, device, a[0], lambda: _table(params, ranks, sizes, device))


def layer_table(found: InForce, place: int, active: tuple[int, ...], device: torch.device) -> Table:
    """The table of some features in one of a model's layers.

    Where the features' vectors are alike it follows from their addresses, and no part of them has to be made. Then the
    tables of all layers with these ranks are made at once: batches of many features seldom have the same ones, and an
    upload for each layer of each batch would cost more than the kernels.

    Args:
        found: the vectors.
        place: the layer's.
        active: the features' ids.
        device: of the table.

    Raises:
        ConfigError: as :func:`bank_table`.
    """
    layout = found.bank.layout
    shape, own = layout.shapes[place], layout.layouts[place]
    if found.addresses is None or found.addresses[0] != device:  # parts are copied, each by itself
        a, b = (
            [v.view(own.ranks[i], size) for i, v in zip(active, side, strict=True)]
            for side, size in zip(
                found.values(active, place, device), (shape.d_in, shape.d_out), strict=True
            )
        )
        table = bank_table(a, b, device)
        return table._replace(held=(a, b, table.held))
    kept = _of_layouts.setdefault(layout, OrderedDict())
    key = id(own), active, found.addresses  # the layout holds its layers' layouts
    tables = _kept(
        kept, key, device, found.vector(active[0]), lambda: _tables_of(found, own, active, device)
    )
    return tables[place]


def _tables_of(
    found: InForce, own: LayerLayout, active: tuple[int, ...], device: torch.device
) -> dict[int, Table]:
    """The tables of all layers with a layout, by place, by one upload."""
    layout, vectors = found.bank.layout, [found.vector(i) for i in active]
    places = [
        place
        for place, (one, shape) in enumerate(zip(layout.layouts, layout.shapes, strict=True))
        if one is own and not shape.experts
    ]
    dtype, ranks = vectors[0].dtype, [own.ranks[i] for i in active]
    first, of, within = bank_rows(ranks)
    at = layout.addresses(places, active, [v.data_ptr() for v in vectors], within, dtype.itemsize)
    values = np.concatenate([np.stack([of, first]), at.reshape(-1, len(of))])
    rank, start, *rows = upload(_even(values), device).unbind(0)
    sides = zip(places, rows[::2], rows[1::2], strict=True)
    return {place: Table((a, b), rank, start, len(of), dtype, max(ranks)) for place, a, b in sides}


def _even(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows that begin aligned alike, which kernels are compiled for."""
    return np.pad(values, ((0, 0), (0, values.shape[1] % 2)))


def _kept(
    tables: OrderedDict[Any, Made],
    key: Any,
    device: torch.device,
    part: Tensor,
    make: Callable[[], Made],
) -> Made:
    """What is kept, or made and kept; ``part`` lies in the memory that it points into."""
    found, capturing = tables.get(key), _capturing(device)
    if found is None:
        if capturing:
            raise _unprepared()
        found = tables[key] = make()
        while len(tables) > (_KEPT if isinstance(found, Table) else _BATCHES):
            tables.popitem(last=False)
    tables.move_to_end(key)
    if capturing:
        _captured.setdefault(part.untyped_storage(), {})[key] = found
    return found


def _unprepared() -> ConfigError:
    """The graph would read its table anew from memory of the host that is long used for something else."""
    return ConfigError(
        "a CUDA graph of fused layers must be captured after a run outside it with the same "
        "features and parameters, which prepares their tables; run the model once before "
        "torch.cuda.graph"
    )
