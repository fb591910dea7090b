"""One token of a generation: what a layer prepares at the first, and keeps while routing and values stay.

A token costs a layer three matrix products and little else, so nothing is looked up or stacked anew for it. What is
kept lies with the routing in force (``InForce.kept``), which a model's forward renews as soon as a value has changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flix.backends.torch.parameters import Values
from flix.backends.torch.placing import Placed
from flix.backends.torch.sums import stack


class Token:
    """A layer's sum for inputs of one shape and dtype.

    Args:
        x: such an input, ``[..., d_in]``, one position a row; any number of them where one row serves all.
        rows: the rows of the routing, N.
        d_out: of the layer.
        placed: the rows on the layer's ranks.
        values: the parts of the features in use.
        strategy: ``"gather"``, ``"masked"`` or ``"single"``.
    """

    __slots__ = ("a", "b", "device", "dtype", "gathered", "lead", "mask", "rows")

    def __init__(
        self, x: Tensor, rows: int, d_out: int, placed: Placed, values: Values, strategy: str
    ) -> None:
        d_in, dtype = x.shape[-1], x.dtype
        self.dtype, self.device, self.rows = dtype, x.device.type, rows
        self.lead = None if len(placed.rows) == 1 else x.shape[:-1]
        a, b = stack(values, d_in, d_out, dtype)
        scale = placed.scale.detach().to(dtype)
        self.mask: Tensor | None = None
        self.gathered = strategy == "gather"
        if strategy == "masked":
            self.a, self.b, self.mask = a.t(), b, placed.mask(dtype)
            return
        slots = placed.rows if self.gathered else placed.rows[0]
        scale = scale if self.gathered else scale[0]
        # The factors are multiplied into B once, not into every token.
        self.a = a[slots].transpose(-1, -2)
        self.b = b[slots] * scale[..., None]

    def fits(self, x: Tensor) -> bool:
        """Whether this is the sum for an input: outside autocast, which computes in other dtypes."""
        return (
            (self.lead is None or x.shape[:-1] == self.lead)
            and x.dtype is self.dtype
            and not torch.is_autocast_enabled(self.device)
        )

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output from its input and the base's, all flat: the base's is added to."""
        if self.gathered:
            h = torch.bmm(x.view(self.rows, 1, -1), self.a)
            y.view(self.rows, 1, -1).baddbmm_(h, self.b)
        else:
            h = torch.mm(x, self.a)
            y.addmm_(h if self.mask is None else h.mul_(self.mask), self.b)
        return y
