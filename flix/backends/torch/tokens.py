"""One token of a generation: what a layer prepares at the first, and keeps while routing and values stay.

A token costs a layer a few small products that wait for memory, so nothing is looked up, stacked or scaled anew, and
what is read is as little as can be: rows under one composition share one copy of its ranks. What is kept lies with the
routing in force (``InForce.tokens``), which a model's forward renews as soon as a value has changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flix.backends.torch.parameters import Values
from flix.backends.torch.placing import Placed
from flix.backends.torch.sums import finite, stack


@dataclass(frozen=True)
class Compositions:
    """Rows of a batch that are alike, put together.

    Attributes:
        first: a row of each composition, C in all.
        order: ``[C * M]``, the rows of each composition, with others' where it has fewer than M; None if it has one.
        places: ``[N]``, where each row stands there.
    """

    first: NDArray[np.int64]
    order: Tensor | None
    places: Tensor

    @property
    def count(self) -> int:
        """C, or N where rows are not put together."""
        return len(self.first)


def compositions(ids: NDArray[np.int64], weights: NDArray[np.float32] | None) -> Compositions:
    """The compositions of rows ``[N, W]``; each row by itself where putting them together would mostly pad."""
    rows = ids if weights is None else np.concatenate([ids, weights.view(np.int32)], axis=1)
    _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    sizes = np.bincount(which)
    count, most = len(first), int(sizes.max())
    if most == 1 or count * most > 2 * len(rows):
        alone = np.arange(len(rows))
        return Compositions(alone, None, torch.from_numpy(alone))
    sort = np.argsort(which, kind="stable")
    within = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = np.empty(len(rows), np.int64)
    places[sort] = which[sort] * most + within
    order = np.zeros(count * most, np.int64)
    order[places] = np.arange(len(rows))
    return Compositions(first, torch.from_numpy(order), torch.from_numpy(places))


class Token:
    """A layer's sum for inputs of one shape and dtype.

    Args:
        x: such an input, ``[..., d_in]``, one position a row; any number of them where one row serves all.
        d_out: of the layer.
        placed: the rows on the layer's ranks.
        values: the parts of the features in use.
        alike: the rows' compositions, for "gather", which "masked" becomes where a value is not finite.
        strategy: the strategy.
    """

    __slots__ = ("a", "b", "device", "dtype", "lead", "mask", "off", "order", "places", "rows")

    def __init__(
        self,
        x: Tensor,
        d_out: int,
        placed: Placed,
        values: Values,
        alike: Compositions,
        strategy: str,
    ) -> None:
        dtype, where = x.dtype, x.device
        self.dtype, self.device = dtype, where.type
        self.lead = None if len(placed.rows) == 1 else x.shape[:-1]
        self.mask = self.off = self.order = self.places = None
        a, b = stack(values, x.shape[-1], d_out, dtype, end=1)
        if strategy == "masked" and finite(a, b):
            self.rows, mask = 1, placed.mask(dtype)
            self.a, self.b, self.off = a[:-1].t().contiguous()[None], b[None, :-1], mask == 0
            factor = mask.amax(0)
            if torch.equal(mask, factor * ~self.off):
                self.b = self.b * factor[:, None]
            else:
                self.mask = mask
            return
        first = alike.first[:1] if strategy == "single" else alike.first
        self.rows = len(first)
        if strategy != "single" and alike.order is not None:
            self.order, self.places = alike.order.to(where), alike.places.to(where)
        chosen = torch.from_numpy(first).to(where)
        slots = (placed.rows if placed.live is None else placed.live)[chosen]
        scale = placed.scale.detach().to(dtype)[chosen]
        # The factors are multiplied into B once, not into every token.
        self.a, self.b = a[slots].transpose(1, 2), b[slots] * scale[..., None]

    def fits(self, x: Tensor) -> bool:
        """Whether this is the sum for an input: outside autocast, which computes in other dtypes."""
        return (
            (self.lead is None or x.shape[:-1] == self.lead)
            and x.dtype is self.dtype
            and not torch.is_autocast_enabled(self.device)
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the sum for an input ``[..., d_in]`` to the base's output for it, ``[..., d_out]``."""
        if self.order is not None:
            x = x.reshape(-1, x.shape[-1]).index_select(0, self.order)
            h = torch.bmm(x.view(self.rows, -1, x.shape[-1]), self.a)
            z = torch.bmm(h, self.b).view(-1, y.shape[-1])
            y.view(-1, y.shape[-1]).add_(z.index_select(0, self.places))  # type: ignore[arg-type]
            return
        if x.dim() != 3 or x.shape[0] != self.rows:
            x, y = x.reshape(self.rows, -1, x.shape[-1]), y.view(self.rows, -1, y.shape[-1])
        h = torch.bmm(x, self.a)
        if self.mask is not None:
            h.mul_(self.mask)
        # Chosen, not multiplied with 0: h may have overflowed where a row does not use it.
        y.baddbmm_(h if self.off is None else h.masked_fill_(self.off, 0), self.b)
