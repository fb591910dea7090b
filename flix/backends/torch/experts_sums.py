"""The routed sum over experts as one autograd function (docs/specification.md §1.4).

Tokens come sorted by the expert that they are sent to. The frozen kernels multiply them in groups of an expert. What a
feature adds is computed over the tokens of the rows that use it, again in groups of an expert: no other row's tokens
pass through its values (docs/specification.md §1.5), and nothing of a kernel's size is made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flix.backends.torch.grouped import Groups, outer, products
from flix.backends.torch.parameters import Carried, Values


@dataclass(frozen=True, eq=False)
class Sent:
    """A batch's tokens, one entry for each expert that a token is sent to, sorted by expert.

    Attributes:
        experts: the entries in groups of an expert.
        token: int64 ``[S]``: the token of each.
        row: int64 ``[S]``: its row in the routing.
    """

    experts: Groups
    token: Tensor
    row: Tensor


@dataclass(frozen=True, eq=False)
class Share:
    """The entries of one feature.

    Attributes:
        place: the feature's among those whose values are given.
        entry: int64 ``[n]``: which of the sorted entries.
        experts: the same in groups of an expert.
        scale: s_f.
        span: which of the factors are theirs.
    """

    place: int
    entry: Tensor
    experts: Groups
    scale: float
    span: slice


class Entries:
    """Which of a batch's sorted entries each feature acts on; each row has as many entries.

    Args:
        ids: integer ``[N, W]`` on the host; -1 pads.
        wanted: the features that are looked for; others do not act.
        sent: the batch's entries.
    """

    def __init__(self, ids: NDArray[Any], wanted: Collection[int], sent: Sent) -> None:
        rows, width = ids.shape
        present = np.unique(ids)
        self.features = [int(i) for i in present if int(i) in wanted]
        count, experts = len(self.features), sent.experts.count
        places = np.full(int(max(present.max(initial=0), 0)) + 2, count)  # the last is that of -1
        places[self.features] = np.arange(count)
        local = places[ids]
        each = len(sent.row) // max(rows, 1)
        ends = np.cumsum(np.bincount(local.ravel(), minlength=count + 1)[:count]) * each
        self._ends = [0, *ends.tolist()]
        table = torch.from_numpy(local).to(sent.row.device)
        keys = table[sent.row] * experts + sent.experts.of.unsqueeze(1)
        keys, order = keys.reshape(-1).sort(stable=True)
        order = order[: self._ends[-1]]
        self._entry, self._column = order // max(width, 1), order % max(width, 1)
        self._row = sent.row
        edges = torch.arange(count * experts, device=keys.device)
        ends = torch.searchsorted(keys[: self._ends[-1]], edges, right=True).view(count, experts)
        starts = torch.tensor(self._ends[:-1], device=keys.device).unsqueeze(1)
        own = (ends - starts).to(torch.int32).unbind(0)
        spans = zip(self._ends[:-1], self._ends[1:], own, strict=True)
        self._groups = [
            Groups(keys[start:end] - i * experts, experts, each)
            for i, (start, end, each) in enumerate(spans)
        ]

    def factors(self, weights: Tensor) -> Tensor:
        """The weight ``[N, W]`` of each feature's entries, feature after feature."""
        return weights[self._row[self._entry], self._column]

    def scattered(self, factors: Tensor, like: Tensor) -> Tensor:
        """The way back from :meth:`factors`."""
        where = self._row[self._entry], self._column
        return torch.zeros_like(like).index_put(where, factors.to(like.dtype), accumulate=True)

    def shares(self, active: Sequence[int], scales: Sequence[float]) -> list[Share]:
        """The entries of some features, in the order of their values, with the scales of all features by id."""
        known = {feature: i for i, feature in enumerate(self.features)}
        found = []
        for place, feature in enumerate(active):
            i = known.get(feature)
            if i is not None:
                span = slice(self._ends[i], self._ends[i + 1])
                entry, scale = self._entry[span], scales[feature]
                found.append(Share(place, entry, self._groups[i], scale, span))
        return found


def forward(
    source: Tensor,
    kernel: Tensor,
    sent: Sent,
    gathers: bool,
    shares: Sequence[Share],
    values: Values,
    factors: Tensor | None,
    *,
    plain: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The output ``[S, d_out]`` of each entry, and each share's rank-space activations.

    Args:
        source: the tokens ``[tokens, d_in]`` if ``gathers``, else the entries ``[S, d_in]``.
        kernel: ``[E, d_in, d_out]``, any strides.
        sent: the entries.
        gathers: whether entries are made of the tokens.
        shares: the features' entries.
        values: A ``[E * r * d_in]`` and B transposed ``[E * r * d_out]`` of the features.
        factors: the weight of each share's entries, or None for 1.
        plain: compute with operations that may be differentiated any number of times.
    """
    x = source.index_select(0, sent.token) if gathers else source
    y = products(x, kernel, sent.experts, plain=plain)
    kept = []
    for share in shares:
        a, b = sides(values, share, kernel, x.dtype)
        own = x.index_select(0, share.entry)
        h = products(own, a.transpose(1, 2), share.experts, small=True, plain=plain)
        factor, off = factor_of(share, factors, x.dtype)
        z = selected(h * factor, off)
        u = selected(products(z, b, share.experts, small=True, plain=plain), off)
        y = y.index_add(0, share.entry, u) if plain else y.index_add_(0, share.entry, u)
        kept.append(h)
    return y, kept


def sides(
    values: Values, share: Share, kernel: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A ``[E, r, d_in]`` and B transposed ``[E, r, d_out]`` of a share's feature."""
    experts, d_in, d_out = kernel.shape
    a = values[0][share.place].view(experts, -1, d_in)
    return a.to(dtype), values[1][share.place].view(experts, -1, d_out).to(dtype)


def factor_of(
    share: Share, factors: Tensor | None, dtype: torch.dtype
) -> tuple[Any, Tensor | None]:
    """A share's factors, weight times s_f, and which of them are 0: there it is present for its weight's gradient."""
    if factors is None:
        return share.scale, None
    own = factors[share.span].unsqueeze(1)
    return own.to(dtype) * share.scale, own.detach() == 0


def selected(x: Tensor, off: Tensor | None) -> Tensor:
    """Rows that are off are 0, whatever their values are."""
    return x if off is None else x.masked_fill(off, 0)


def backward(
    dy: Tensor,
    source: Tensor,
    kernel: Tensor,
    sent: Sent,
    gathers: bool,
    shares: Sequence[Share],
    values: Values,
    factors: Tensor | None,
    kept: Sequence[Tensor],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of source, kernel, factors and values, in the entries' dtype; None where not needed.

    Those of the values are one vector: of A of each feature, then of B transposed of each.
    """
    need_x, need_kernel, need_factors, need_values = needs
    dx = products(dy, kernel.transpose(1, 2), sent.experts) if need_x else None
    d_factors = torch.zeros_like(factors) if need_factors and factors is not None else None
    flat: Tensor | None = None
    parts: tuple[Tensor, ...] = ()
    if need_values:
        sizes = [v.numel() for side in values for v in side]
        flat = dy.new_empty(sum(sizes))
        parts = flat.split_with_sizes(sizes)
        held = {share.place for share in shares}
        for i, part in enumerate(parts):
            if i % len(values[0]) not in held:
                part.zero_()
    for share, h in zip(shares, kept, strict=True):
        a, b = sides(values, share, kernel, dy.dtype)
        grad = dy.index_select(0, share.entry)
        dh = products(grad, b.transpose(1, 2), share.experts, small=True)
        factor, off = factor_of(share, factors, dy.dtype)
        if d_factors is not None:
            d_factors[share.span] = (dh * h).sum(1).to(d_factors.dtype) * share.scale
        dh = selected(dh * factor, off)
        if flat is not None:
            where = sent.token[share.entry] if gathers else share.entry
            own = source.index_select(0, where)
            z = selected(h * factor, off)
            outer(dh, own, share.experts, parts[share.place].view(a.shape))
            outer(z, grad, share.experts, parts[share.place + len(values[0])].view(b.shape))
        if dx is not None:
            part = products(dh, a, share.experts, small=True)
            dx.index_add_(0, share.entry, selected(part, off))
    d_kernel = None
    if need_kernel:
        x = source.index_select(0, sent.token) if gathers else source
        d_kernel = outer(x, dy, sent.experts, dy.new_empty(kernel.shape))
    if dx is not None and gathers:
        dx = torch.zeros_like(source).index_add_(0, sent.token, dx)
    return dx, d_kernel, d_factors, flat


class RoutedExperts(torch.autograd.Function):
    """y = x W_e + Σ_f weight · s_f · B_fe (A_fe x) for each entry of expert e, by its own row's features f.

    Inputs: source, kernel and factors as :func:`forward` has them; the layer's carrier (see ``parameters``) or None;
    the entries, whether they are gathered, the shares and the values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        kernel: Tensor,
        factors: Tensor | None,
        carrier: Tensor | None,
        sent: Sent,
        gathers: bool,
        shares: Sequence[Share],
        values: Values,
    ) -> Tensor:
        y, kept = forward(source, kernel, sent, gathers, shares, values, factors)
        ctx.save_for_backward(source, kernel, factors, carrier, *kept)
        ctx.sent, ctx.gathers, ctx.shares, ctx.values = sent, gathers, shares, values
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            return (*_differentiable(ctx, dy), None, None, None, None)
        source, kernel, factors, carrier, *kept = ctx.saved_tensors
        dx, d_kernel, d_factors, grad = backward(
            dy.contiguous(),
            source,
            kernel,
            ctx.sent,
            ctx.gathers,
            ctx.shares,
            ctx.values,
            factors,
            kept,
            ctx.needs_input_grad[:4],
        )
        if grad is not None:
            grad = grad.to(carrier.device, carrier.dtype)
        return dx, d_kernel, d_factors, grad, None, None, None, None


def _differentiable(ctx: Any, dy: Tensor) -> Any:
    """The gradients as plain operations, which are differentiated again (``create_graph``)."""
    given: list[Any] = [None if v is None else v.view_as(v) for v in ctx.saved_tensors[:4]]
    source, kernel, factors, carrier = given
    values: Values = ctx.values
    if carrier is not None:
        parts = Carried.apply(carrier, *values)  # type: ignore[no-untyped-call]
        values = parts[: len(values[0])], parts[len(values[0]) :]
    y, _ = forward(source, kernel, ctx.sent, ctx.gathers, ctx.shares, values, factors, plain=True)
    needs = ctx.needs_input_grad[:4]
    wanted = [v for v, need in zip(given, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return (next(found) if need else None for need in needs)
