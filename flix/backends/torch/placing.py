"""A batch's routing on a layer's ranks, as tensors on one device; see :mod:`flix.core.strategy.union`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
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
        rows: int64 ``[N, R]``: the slot of the union that each slot of a row is; U where it is unused.
        scale: ``[N, R]``, weight times s_f; it carries gradient where the weights do.
        host: the same on the host.
        learned: whether the weights are, so that features with the weight 0 are there for its gradient.
    """

    active: tuple[int, ...]
    union: int
    rows: Tensor
    scale: Tensor
    host: UnionPlan
    learned: bool = False
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
            zeros = scale.new_zeros(scale.shape[0], self.union + 1)
            found = zeros.scatter_add_(1, self.rows, scale)[:, : self.union]
            self._masks[dtype] = found
        return found

    @cached_property
    def live(self) -> Tensor | None:
        """``rows``, but U where the factor of a slot is 0: its feature serves the factor's gradient, no row.

        None where there are no such slots.
        """
        if not self.learned:
            return None
        live = torch.where(self.scale.detach() == 0, self.union, self.rows)
        return None if torch.equal(live, self.rows) else live

    def grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernels need, see :meth:`UnionPlan.grouped`."""
        if self._grouped is None:
            arrays = self.host.grouped()
            # One upload for the three of them, each aligned alike, as kernels are compiled for.
            padded = [np.pad(array.ravel(), (0, -array.size % 4)) for array in arrays]
            moved = upload(np.concatenate(padded), self.rows.device)
            parts = torch.split(moved, [len(array) for array in padded])
            rows, order, starts = (p[: a.size] for p, a in zip(parts, arrays, strict=True))
            self._grouped = (rows.view(arrays[0].shape), order, starts)
        return self._grouped
