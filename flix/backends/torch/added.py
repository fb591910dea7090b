"""Updates that are added to what gave the base map: another forward's output, or the base of an input that the updates
see with some of its entries dropped (``lora_dropout``, docs/specification.md §1.8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flix.backends.torch.kernels.routes import used
from flix.backends.torch.layer import FlixLayer, with_grad
from flix.backends.torch.parameters import Carried, Values
from flix.backends.torch.placing import Placed
from flix.backends.torch.routing import ActiveRouting, AnyRouting, TracedRouting
from flix.backends.torch.sums import routed_backward, routed_forward, stack, traced_linear


def added(layer: FlixLayer, x: Tensor, base: Tensor, routing: AnyRouting) -> Tensor:
    """``base + Σ w s B_f (A_f x)``, by the layer's strategy; in compiled graphs gather takes the place of "fused".

    Args:
        layer: the layer.
        x: what the low-rank maps get, ``[N, S, d_in]``.
        base: ``[N, S, d_out]``; it is not changed.
        routing: the routing in force.
    """
    if isinstance(routing, TracedRouting):
        return _traced(layer, x, base, routing)
    placed = layer._placed(x, routing)
    strategy = placed.strategy(layer.flix_strategy, x)
    layer._check_single(routing, strategy)
    if not placed.active or x.shape[0] == 0:
        return with_grad(base, layer.training)
    if strategy == "fused":
        return _fused(layer, x, base, placed, routing)
    values, carrier = layer._values(placed, routing, x.device)
    scale = placed.scale.to(x.dtype)
    y: Tensor = Added.apply(x, base, scale, carrier, placed, strategy, values)  # type: ignore[no-untyped-call]
    return y


def _fused(
    layer: FlixLayer, x: Tensor, base: Tensor, placed: Placed, routing: ActiveRouting
) -> Tensor:
    # Triton is loaded when it is needed.
    from flix.backends.torch.kernels.eager import FusedAround

    found, place = routing.in_force(layer.flix_state), layer.flix_place
    return FusedAround.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, base, placed.scale, found.carrier(place), placed, found, place
    )


def _traced(layer: FlixLayer, x: Tensor, base: Tensor, routing: TracedRouting) -> Tensor:
    pairs = layer._traced_pairs(routing)
    if not pairs[0] or routing.flat.shape[1] == 0:
        return base
    rows, scale, *_ = layer._traced_slots(routing, x)
    a, b = stack(pairs, layer.d_in, layer.d_out, x.dtype, end=1)
    strategy = "single" if layer.flix_strategy == "single" else "gather"
    return traced_linear(x, base, scale.to(x.dtype), used(rows, len(a) - 1), a, b, strategy)


class Added(torch.autograd.Function):
    """``base + Σ_slots scale · B_slot (A_slot x)``: :class:`flix.backends.torch.sums.RoutedLinear` without a kernel.

    Inputs: x ``[N, S, d_in]``, base ``[N, S, d_out]``, and RoutedLinear's others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        scale: Tensor,
        carrier: Tensor | None,
        placed: Placed,
        strategy: str,
        values: Values,
    ) -> Tensor:
        given = (x, base, None, scale, placed.rows, strategy, values)
        y, h, strategy = routed_forward(*given, **_made(placed, strategy, x.dtype))
        ctx.save_for_backward(x, scale, carrier, h)
        ctx.strategy, ctx.placed, ctx.values = strategy, placed, values
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            return (*differentiable(ctx, grad), None, None, None)
        x, scale, carrier, h = ctx.saved_tensors
        need_x, need_base, need_scale, need_pairs = ctx.needs_input_grad[:4]
        placed: Placed = ctx.placed
        dx, d_scale, d_pairs = routed_backward(
            grad.contiguous(),
            x,
            None,
            scale,
            placed.rows,
            h,
            ctx.strategy,
            ctx.values,
            need_x=need_x,
            need_scale=need_scale,
            need_pairs=need_pairs,
            **_made(placed, ctx.strategy, x.dtype),
        )
        if d_pairs is not None:
            d_pairs = d_pairs.to(carrier.device, carrier.dtype)
        return dx, grad if need_base else None, d_scale, d_pairs, None, None, None


def _made(placed: Placed, strategy: str, dtype: torch.dtype) -> dict[str, Any]:
    """What was made before, once for all layers."""
    factor = placed.mask(dtype) if strategy == "masked" else None
    return {"blocks": placed.host.blocks, "factor": factor, "live": placed.live}


def differentiable(ctx: Any, grad: Tensor) -> Iterator[Tensor | None]:
    """The gradients of :class:`Added` as plain operations, which are differentiated again (``create_graph``)."""
    # Aliases: one input may be made of another, and only its direct part is wanted here.
    held: list[Any] = [None if v is None else v.view_as(v) for v in ctx.saved_tensors[:3]]
    x, scale, carrier = held
    values: Values = ctx.values
    if carrier is not None:
        parts = Carried.apply(carrier, *values)  # type: ignore[no-untyped-call]
        values = parts[: len(values[0])], parts[len(values[0]) :]
    a, b = stack(values, x.shape[-1], grad.shape[-1], x.dtype, end=1)
    y = traced_linear(
        x, torch.zeros_like(grad), scale.to(x.dtype), ctx.placed.rows, a, b, ctx.strategy
    )
    need_x, need_base, *others = ctx.needs_input_grad[:4]
    wanted = [v for v, need in zip(held, (need_x, *others), strict=True) if need]
    found = iter(
        torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True) if wanted else ()
    )
    yield next(found) if need_x else None
    yield grad if need_base else None
    for need in others:
        yield next(found) if need else None
