"""Convolutions, adapted: each row's own low-rank kernels beside a frozen one (docs/specification.md §1.1, §5.2).

A kernel ``[d_out, C, k...]`` is taken for the matrix ``[d_out, C * prod(k)]`` that it is, row-major: at every place of
the output it multiplies the patch of the input that lies under it. So a pair is A ``[r, C * prod(k)]``, r kernels of
the layer's own size, and B ``[d_out, r]``, a convolution of size 1: PEFT's LoRA of a convolution. The layer's own
forward is called, and the update added to it: one convolution whose groups are the rows, each with its own kernels,
and a product with each row's B.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flix.backends import messages
from flix.backends.torch.kernels.routes import used
from flix.backends.torch.layer import FlixLayer, with_grad
from flix.backends.torch.routing import AnyRouting, TracedRouting
from flix.backends.torch.rows import noted, rows_of
from flix.backends.torch.sums import stack
from flix.core.adapter.adapter import LayerShape


class FlixConvolution(FlixLayer):
    """What an adapted convolution has over its own class.

    Whatever the strategy is, it gathers; ``"single"`` still refuses rows that differ.
    """

    kernel_size: tuple[int, ...]
    weight: Any
    stride: Any
    padding: Any
    dilation: Any
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]

    @classmethod
    def shape_of(cls, layer: Any) -> LayerShape:
        d_out, *patch = layer.weight.shape
        return LayerShape(math.prod(patch), d_out, cls.flix_kind)

    @property
    def d_in(self) -> int:
        """The size of a patch: channels times the kernel's sizes."""
        return math.prod(self.weight.shape[1:])

    @property
    def d_out(self) -> int:
        """Channels of the output."""
        return int(self.weight.shape[0])

    def forward(self, x: Tensor, flix_features: Any = None, flix_weights: Any = None) -> Tensor:
        """The adapted convolution.

        Args:
            x: ``[B, C, ...]``.
            flix_features: int ``[B, W]``; default: the routing in force.
            flix_weights: float in that shape; default 1.

        Returns:
            ``[B, d_out, ...]``.

        Raises:
            RoutingError: no routing, routing that does not fit x, or routing by token where rows are not alike.
        """
        base: Tensor = self.flix_base.forward(self, x)
        routing = self._routing(flix_features, flix_weights)
        if routing is None:
            return base
        if x.shape[:1] == (0,):
            return with_grad(base, self.training)
        places = len(self.kernel_size)
        if len(routing.lead) == 2 or x.dim() != places + 2:
            if (one := routing.alone()) is None:
                raise messages.no_rows_of_places(self.flix_name, list(x.shape), len(routing.lead))
            routing = one
        single = x.dim() == places + 1
        x, own = (x[None], base[None]) if single else (x, base)
        x, count, _, routing = rows_of(self, x, routing, trailing=places)
        own = own.expand(x.shape[0], *own.shape[1:])
        with torch.autocast(x.device.type, enabled=False):
            x, rate = x.to(base.dtype), self._dropped()
            y = self._sum(F.dropout(x, rate) if rate else x, own, count, routing)
        return noted(self, y[0] if single else y, routing)

    def _sum(self, x: Tensor, base: Tensor, count: int, routing: AnyRouting) -> Tensor:
        """The base's output plus each row's update.

        Args:
            x: ``[N * m, C, ...]``, m entries for each row, one row's in turn.
            base: ``[N * m, d_out, ...]``.
            count: N.
            routing: of N rows.
        """
        if isinstance(routing, TracedRouting):
            pairs = self._traced_pairs(routing)
            if not pairs[0] or routing.flat.shape[1] == 0:
                return base
            slots, scale, *_ = self._traced_slots(routing, x)
            a, b = stack(pairs, *self._sizes(), x.dtype, end=1)
            return self._added(x, base, scale.to(x.dtype), used(slots, len(a) - 1), a, b)
        self._check_single(routing, self.flix_strategy)
        one = routing.alone()  # all entries under one kernel: a convolution without groups
        placed = self._placed(x, routing if one is None else one)
        if not placed.active:
            return with_grad(base, self.training)
        pairs = self._pairs_of(*self._values(placed, routing, x.device))
        a, b = stack(pairs, *self._sizes(), x.dtype, end=1)
        y = self._added(x, base, placed.scale.to(x.dtype), placed.rows, a, b)
        return self._open(y, self.training)

    def _added(
        self, x: Tensor, base: Tensor, scale: Tensor, slots: Tensor, a: Tensor, b: Tensor
    ) -> Tensor:
        """``base + Σ_slots scale · B_slot (A_slot * x)``; a slot with the factor 0 adds nothing, whatever it holds.

        Args:
            x: ``[N * m, C, ...]``.
            base: ``[N * m, d_out, ...]``.
            scale: ``[N, R]``.
            slots: int64 ``[N, R]``: rows of A and B; of unused slots, the last.
            a: ``[U + 1, d_in]``.
            b: ``[U + 1, d_out]``.
        """
        count, rank = slots.shape
        off = scale == 0
        own_a, own_b = a[slots], b[slots]
        own_a = torch.where(off[..., None], own_a.nan_to_num(), own_a)
        own_b = torch.where(off[..., None], own_b.nan_to_num(), own_b).transpose(1, 2)
        kernel = own_a.reshape(-1, *self.weight.shape[1:])
        # Groups are channels: each row's entries stand below each other, and rows side by side.
        x = x.reshape(count, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        h = self._convolved(x, kernel, count)
        h = h.reshape(len(h), count, rank, -1).transpose(0, 1)
        off, factor = off[:, None, :, None], scale[:, None, :, None]
        z = torch.where(off, h.nan_to_num(), h) * factor  # [N, m, R, places]
        update = torch.matmul(own_b[:, None], z).flatten(0, 1)
        return base + update.view(base.shape)

    def _convolved(self, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
        run = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        stride, padding, apart = self.stride, self.padding, self.dilation
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return run(x, kernel, None, stride, padding, apart, groups)


class FlixConv1d(FlixConvolution, nn.Conv1d):
    """A frozen ``nn.Conv1d`` plus each row's update."""


class FlixConv2d(FlixConvolution, nn.Conv2d):
    """A frozen ``nn.Conv2d`` plus each row's update."""


class FlixConv3d(FlixConvolution, nn.Conv3d):
    """A frozen ``nn.Conv3d`` plus each row's update."""


ADAPTED: dict[type[nn.Module], type[FlixConvolution]] = {
    nn.Conv1d: FlixConv1d,
    nn.Conv2d: FlixConv2d,
    nn.Conv3d: FlixConv3d,
}
"""What convolutions become."""


def convolution(module: nn.Module) -> tuple[type[FlixConvolution] | None, str]:
    """The class that a convolution becomes, or None and the reason; both empty for modules of other kinds."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None, ""
    target = ADAPTED.get(type(module))
    if module.transposed:
        return None, "it is a transposed convolution"
    if target is None:
        return (
            None,
            f"its class {type(module).__name__} is not a plain nn.Conv1d, nn.Conv2d or nn.Conv3d",
        )
    if module.groups > 1:
        return None, (
            f"its kernel is {module.groups} smaller ones, one for each group of channels (groups={module.groups}), "
            "which have no common low-rank pair"
        )
    return target, ""


def peft_reason(layer: FlixConvolution) -> str:
    """Why PEFT (0.21) would compute another update than this layer's; empty where it computes the same."""
    if any(apart != 1 for apart in layer.dilation):
        found = f"dilation={tuple(layer.dilation)}"
    elif layer.padding_mode != "zeros":
        found = f"padding_mode={layer.padding_mode!r}"
    else:
        return ""
    return f"is a convolution with {found}, which PEFT leaves out of its LoRA"
