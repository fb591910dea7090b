"""A batch's routing on a layer's ranks, as tensors on one device; see :mod:`flix.core.strategy.union`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flix.backends.torch.kernels.choice import strategy_for
from flix.backends.torch.kernels.tables import upload
from flix.core.strategy.union import UnionPlan


@dataclass
class Placed:
    """The rows of a batch on the union of its features in one layout.

    Attributes:
        active: ids of the features whose parameters take part, ascending.
        union: the number of their ranks, U.
        rows: int64 ``[N, R]``: the slot of the union that each slot of a row is.
        scale: ``[N, R]``, weight times s_f; it carries gradient where the weights do.
        host: the same on the host.
    """

    active: tuple[int, ...]
    union: int
    rows: Tensor
    scale: Tensor
    host: UnionPlan
    _grouped: tuple[Tensor, Tensor, Tensor] | None = None
    _masks: dict[torch.dtype, Tensor] = field(default_factory=dict)
    _strategies: dict[Any, str] = field(default_factory=dict)

    def strategy(self, asked: str, x: Tensor, kept: int = 0) -> str:
        """The strategy for x ``[N, S, d_in]``; decided once for all layers that see such inputs.

        Args:
            asked: what the user asked for.
            x: an input.
            kept: of how many compositions copies would be kept between calls; 0 if none are.
        """
        key = (asked, x.shape[0], x.shape[1], x.dtype, kept)
        found = self._strategies.get(key)
        if found is None:
            rows = self.rows.shape[1]
            found = strategy_for(asked, x, rows=rows, union=self.union, kept=kept)
            self._strategies[key] = found
        return found

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Each row's factor for every slot of the union, ``[N, U]``; made once for all layers, without gradient."""
        found = self._masks.get(dtype)
        if found is None:
            scale = self.scale.detach().to(dtype)
            zeros = scale.new_zeros(scale.shape[0], self.union)
            found = self._masks[dtype] = zeros.scatter_add_(1, self.rows, scale)
        return found

    def grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernels need: int32 rows, -1 where unused, and the slots of each union row (order, starts)."""
        if self._grouped is None:
            used = self.host.scales != 0
            rows = np.where(used, self.host.rows, -1).astype(np.int32)
            flat = np.where(used, self.host.rows, self.union).ravel()
            order = np.argsort(flat, kind="stable")
            starts = np.searchsorted(flat[order], np.arange(self.union + 1))
            # One upload for the three of them, each aligned alike, as kernels are compiled for.
            arrays = [rows.ravel(), order.astype(np.int32), starts.astype(np.int32)]
            sizes = [array.size for array in arrays]
            whole = np.concatenate([np.pad(array, (0, -array.size % 4)) for array in arrays])
            moved = upload(whole, self.rows.device)
            first, second, third = (
                part[:size]
                for part, size in zip(
                    torch.split(moved, [size + -size % 4 for size in sizes]), sizes, strict=True
                )
            )
            self._grouped = (first.view(rows.shape), second, third)
        return self._grouped
