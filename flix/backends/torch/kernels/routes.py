"""Placing ids on a layer's bank inside compiled graphs, on whichever device the ids are: ``flix::routes``.

Sizes follow from the shape of the ids and the widest rank, so nothing is recompiled for other ids. Layers of one
layout call it with the same arguments, which compilers compute once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_INT = torch.int32


@lru_cache(maxsize=256)
def _features(
    ranks: tuple[int, ...], scales: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank, first bank row and factor of each feature, then of padding, then of an id of no feature.

    That last one has slots, with a factor of NaN: its row's output is NaN, never silently the base's.
    """
    widest, start, starts = max(ranks), 0, []
    for rank in ranks:
        starts.append(start)
        start += rank
    return (
        torch.tensor([*ranks, 0, widest], device=device),
        torch.tensor([*starts, 0, 0], device=device),
        torch.tensor([*scales, 0.0, float("nan")], dtype=torch.float64, device=device),
    )


@torch.library.custom_op("flix::routes", mutates_args=())
def routes(
    ids: Tensor, ranks: Sequence[int], scales: Sequence[float], wide: bool, grouped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slots of each row of ids, in a bank that holds every registered feature.

    Args:
        ids: integer ``[N, W]``; -1 pads. Rows with an id of no feature get factors of NaN.
        ranks, scales: r_f and s_f of each registered feature; some rank is above 0.
        wide: whether factors are float64, else float32.
        grouped: whether ``order`` and ``starts`` are wanted (for gradients); else they are empty.

    Returns:
        rows: int32 ``[N, R]``, the bank row of each slot, -1 where unused; used slots come first.
        slots: int64 ``[N, R]``, the column of the ids that each slot came from.
        factor: ``[N, R]``, s_f of each slot; 0 where unused.
        order, starts: int32; ``order[starts[u]:starts[u + 1]]`` are the slots (n * R + slot) of bank row u.
    """
    count, width = ids.shape
    features, widest, bank = len(ranks), max(ranks), sum(ranks)
    dtype = torch.float64 if wide else torch.float32
    rank, first, factor = _features(tuple(ranks), tuple(scales), ids.device)
    ids = ids.to(torch.int64)
    index = torch.where(ids == -1, features, ids)
    index = torch.where((index < 0) | (index > features), features + 1, index)
    index = torch.where(ids == features, features + 1, index)
    lengths = rank[index]
    ends = lengths.cumsum(1)
    column = torch.arange(width * widest, device=ids.device).expand(count, -1).contiguous()
    slots = torch.searchsorted(ends, column, right=True)
    used = slots < width
    slots = slots.clamp_(max=max(0, width - 1))
    if width == 0:
        slots = column
    picked = index.gather(1, slots)
    within = column - (ends - lengths).gather(1, slots)
    rows = torch.where(used, first[picked] + within, -1).to(_INT)
    scale = torch.where(used, factor[picked], 0.0).to(dtype)
    if not grouped:
        empty = rows.new_empty(0)
        return rows, slots, scale, empty, empty.clone()
    order, starts = group(rows, bank)
    return rows, slots, scale, order, starts


@routes.register_vmap
def _(
    info: Any, dims: Any, ids: Tensor, ranks: Any, scales: Any, wide: bool, grouped: bool
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    ids = ids.movedim(dims[0], 0)
    found = routes(ids.flatten(0, 1), ranks, scales, wide, False)
    some = tuple(value.view(*ids.shape[:2], -1) for value in found[:3])
    return (*some, *found[3:]), (0, 0, 0, None, None)


def group(rows: Tensor, bank: int) -> tuple[Tensor, Tensor]:
    """The slots of each bank row: (order, starts) as ``routes`` gives them; unused slots come last."""
    found, order = torch.where(rows < 0, bank, rows).reshape(-1).sort(stable=True)
    edges = torch.arange(bank + 1, dtype=_INT, device=rows.device)
    return order.to(_INT), torch.searchsorted(found, edges).to(_INT)


def used(rows: Tensor, bank: int) -> Tensor:
    """Rows to index a bank with that has a row of zeros at its end, which is that of unused slots."""
    return torch.where(rows < 0, bank, rows).to(torch.int64)


@routes.register_fake
def _(
    ids: Tensor, ranks: Sequence[int], scales: Sequence[float], wide: bool, grouped: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, slots = ids.shape[0], ids.shape[1] * max(ranks)
    return (
        ids.new_empty((count, slots), dtype=_INT),
        ids.new_empty((count, slots), dtype=torch.int64),
        ids.new_empty((count, slots), dtype=torch.float64 if wide else torch.float32),
        ids.new_empty(count * slots if grouped else 0, dtype=_INT),
        ids.new_empty(sum(ranks) + 1 if grouped else 0, dtype=_INT),
    )
