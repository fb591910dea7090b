"""The routed sum over experts as one autograd function (docs/specification.md §1.4).

Tokens come sorted by the expert that they are sent to. The frozen kernels multiply them in groups of an expert. What a
feature adds is computed over the tokens of the rows that use it, again in groups of an expert: no other row's tokens
pass through its values (docs/specification.md §1.5), and nothing of a kernel's size is made. See
:mod:`flix.backends.torch.experts_entries` for which entries those are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flix.backends.torch.experts_entries import Sent, Share
from flix.backends.torch.grouped import Groups, outer, products
from flix.backends.torch.parameters import Carried, Values

_CACHED = 1 << 20
"""Entries times sizes that are computed at a time on a CPU: what steps hand on then stays in its caches."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Some experts with all their entries, and what the shares have of them.

    Attributes:
        experts: which.
        rows: which of the entries.
        groups: these in groups of an expert.
        shares: for each share, its own rows, these as rows of the piece (None for all), and their groups.
    """

    experts: slice
    rows: slice
    groups: Groups
    shares: list[tuple[slice, Tensor | None, Groups]]


def pieces(
    kernel: Tensor, sent: Sent, shares: Sequence[Share], *, one: bool = False
) -> list[Piece]:
    """The experts piece by piece: one for all, but on a CPU as many as keep to its caches."""
    experts, *sizes = kernel.shape
    entries = len(sent.experts)
    count = -(-entries * max(sizes) // _CACHED)
    if one or kernel.device.type != "cpu" or count <= 1 or sent.experts.few:
        whole = [(slice(0, len(s.groups)), s.entry, s.groups) for s in shares]
        return [Piece(slice(0, experts), slice(0, entries), sent.experts, whole)]
    found = []
    each = max(1, experts // count)
    for first in range(0, experts, each):
        last = min(first + each, experts)
        groups, rows = sent.experts.part(first, last)
        parts = []
        for share in shares:
            features = len(share.places)
            own, span = share.groups.part(first * features, last * features)
            parts.append(
                (span, None if share.entry is None else share.entry[span] - rows.start, own)
            )
        found.append(Piece(slice(first, last), rows, groups, parts))
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
    made = pieces(kernel, sent, shares, one=plain)
    whole = source.new_empty(len(sent.experts), kernel.shape[2]) if len(made) > 1 else None
    kept: list[list[Tensor]] = [[] for _ in shares]
    for piece in made:
        x = inputs(source, sent, piece, gathers)
        place = None if whole is None else whole[piece.rows]
        y = products(x, kernel[piece.experts], piece.groups, plain=plain, out=place)
        for share, part, held in zip(shares, piece.shares, kept, strict=True):
            a, b = sides(values, share, piece, kernel, x.dtype)
            h = products(taken(x, part), a.transpose(1, 2), part[2], small=True, plain=plain)
            factor, off = factor_of(share, part[0], factors, x.dtype)
            z = selected(h * factor, off)
            u = selected(products(z, b, part[2], small=True, plain=plain), off)
            y = added(y, part, u, plain=plain)
            held.append(h)
    return y if whole is None else whole, [h[0] if len(h) == 1 else torch.cat(h) for h in kept]


def activations(
    source: Tensor,
    kernel: Tensor,
    sent: Sent,
    gathers: bool,
    shares: Sequence[Share],
    values: Values,
) -> list[Tensor]:
    """Each share's rank-space activations alone; see :func:`forward`."""
    kept: list[list[Tensor]] = [[] for _ in shares]
    for piece in pieces(kernel, sent, shares):
        x = inputs(source, sent, piece, gathers)
        for share, part, held in zip(shares, piece.shares, kept, strict=True):
            a = sides(values, share, piece, kernel, x.dtype)[0]
            held.append(products(taken(x, part), a.transpose(1, 2), part[2], small=True))
    return [h[0] if len(h) == 1 else torch.cat(h) for h in kept]


def inputs(source: Tensor, sent: Sent, piece: Piece, gathers: bool) -> Tensor:
    """A piece's entries: of tokens if ``gathers``, else of entries."""
    return source.index_select(0, sent.token[piece.rows]) if gathers else source[piece.rows]


def taken(x: Tensor, part: tuple[slice, Tensor | None, Groups]) -> Tensor:
    """A share's entries of a piece's."""
    return x if part[1] is None else x.index_select(0, part[1])


def added(
    y: Tensor, part: tuple[slice, Tensor | None, Groups], u: Tensor, *, plain: bool = False
) -> Tensor:
    """What a share gives, added to a piece's entries, in place if it may be."""
    if part[1] is None:
        return y + u if plain else y.add_(u)
    return y.index_add(0, part[1], u) if plain else y.index_add_(0, part[1], u)


def sides(
    values: Values, share: Share, piece: Piece, kernel: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A ``[G, r, d_in]`` and B transposed ``[G, r, d_out]`` of a share's groups in a piece."""
    experts, *sizes = kernel.shape
    a, b = (
        _stacked([side[place] for place in share.places], experts, size, piece.experts).to(dtype)
        for side, size in zip(values, sizes, strict=True)
    )
    return a, b


def _stacked(parts: Sequence[Tensor], experts: int, size: int, some: slice) -> Tensor:
    """Flat ``[E * r * size]`` of F features as ``[E F, r, size]``, for some of the experts."""
    rank = parts[0].numel() // (experts * size)
    views = [part.view(experts, rank * size)[some] for part in parts]
    return (views[0] if len(views) == 1 else torch.cat(views, 1)).view(-1, rank, size)


def factor_of(
    share: Share, rows: slice, factors: Tensor | None, dtype: torch.dtype
) -> tuple[Any, Tensor | None]:
    """The factors of a share's rows, weight times s_f, and which are 0: present for their weight's gradient alone."""
    if factors is None:
        return share.scale, None
    assert share.span is not None
    own = factors[share.span[rows]].unsqueeze(1)
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
    made = pieces(kernel, sent, shares)
    many = len(made) > 1
    d_factors = torch.zeros_like(factors) if need_factors and factors is not None else None
    d_source = torch.zeros_like(source) if need_x and gathers else None
    if need_x and not gathers and many:
        d_source = torch.empty_like(source)
    d_kernel = dy.new_empty(kernel.shape) if need_kernel else None
    flat, parts = _places(values, shares, dy) if need_values else (None, ())
    for piece in made:
        grad_y, dx = dy[piece.rows], None
        if need_x:
            out = d_source[piece.rows] if many and not gathers else None  # type: ignore[index]
            turned = kernel[piece.experts].transpose(1, 2)
            dx = products(grad_y, turned, piece.groups, out=out)
        x = inputs(source, sent, piece, gathers) if need_values or need_kernel else None
        for share, part, all_h in zip(shares, piece.shares, kept, strict=True):
            h, groups = all_h[part[0]], part[2]
            a, b = sides(values, share, piece, kernel, dy.dtype)
            grad = taken(grad_y, part)
            dh = products(grad, b.transpose(1, 2), groups, small=True)
            factor, off = factor_of(share, part[0], factors, dy.dtype)
            if d_factors is not None:
                span = share.span[part[0]]  # type: ignore[index]
                d_factors[span] = (dh * h).sum(1).to(d_factors.dtype) * share.scale
            dh = selected(dh * factor, off)
            if need_values:
                assert x is not None
                sizes = len(values[0])
                outer_of(dh, taken(x, part), share, piece, groups, parts[:sizes])
                z = selected(h * factor, off)
                outer_of(z, grad, share, piece, groups, parts[sizes:])
            if dx is not None:
                u = selected(products(dh, a, groups, small=True), off)
                dx = added(dx, part, u)
        if d_kernel is not None:
            assert x is not None
            outer(x, grad_y, piece.groups, d_kernel[piece.experts])
        if dx is not None and gathers:
            assert d_source is not None
            d_source.index_add_(0, sent.token[piece.rows], dx)
        elif dx is not None and not many:
            d_source = dx
    return d_source, d_kernel, d_factors, flat


def _places(
    values: Values, shares: Sequence[Share], like: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A vector for the gradients of all values, and where those of each are in it; of features without entries 0."""
    sizes = [v.numel() for side in values for v in side]
    flat = like.new_empty(sum(sizes))
    parts = flat.split_with_sizes(sizes)
    held = {place for share in shares for place in share.places}
    for i, part in enumerate(parts):
        if i % len(values[0]) not in held:
            part.zero_()
    return flat, parts  # type: ignore[return-value]


def outer_of(
    a: Tensor, b: Tensor, share: Share, piece: Piece, groups: Groups, parts: Sequence[Tensor]
) -> None:
    """Write each feature's sums of outer products to its part, ``[E * p * q]``, where a piece's experts are."""
    count, shape = len(share.places), (a.shape[1], b.shape[1])
    experts = groups.count // count
    places = [parts[p].view(-1, *shape)[piece.experts] for p in share.places]
    if count == 1:
        outer(a, b, groups, places[0])
        return
    made = outer(a, b, groups).view(experts, count, *shape)
    for f, place in enumerate(places):
        place.copy_(made[:, f])


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
