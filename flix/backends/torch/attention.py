"""``nn.MultiheadAttention``, adapted: its projections act by row (docs/specification.md §5.2).

It keeps the projections of queries, keys and values in one parameter ``in_proj_weight`` ``[3 d, d]``, which is no
layer, and reads the kernel of ``out_proj`` past its forward. Adapted, the first is a layer by the path of its
parameter, as kernels of experts are, the second is called, and what lies between them is computed here as the plain
module says it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flix.backends import messages
from flix.backends.torch.layer import KERNELS
from flix.backends.torch.layers import FlixLinear, carry
from flix.backends.torch.patches.hooked import rebind, runs_own
from flix.backends.torch.state import FlixState
from flix.backends.torch.tokens import Token
from flix.core.adapter.adapter import LayerShape
from flix.core.errors import TargetError

PACKED = "in_proj_weight"


def attention_of(module: nn.Module) -> tuple[dict[str, LayerShape], str]:
    """The kernel of a module's packed projections by its parameter, adapted or not, or none and the reason.

    The reason is empty for modules of other kinds. Where it is not, ``out_proj`` cannot be adapted, either.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return {}, ""
    kernel = module._parameters.get(PACKED)
    if type(module) not in (nn.MultiheadAttention, FlixAttention):
        return {}, f"{type(module).__name__} is a subclass of nn.MultiheadAttention"
    if not runs_own(module):
        return {}, "its forward is patched on the instance"
    if kernel is None:
        return (
            {},
            "its projections are three parameters, of keys and values of other sizes (kdim, vdim)",
        )
    if not kernel.is_floating_point():
        return {}, "its kernel is quantised"
    return {PACKED: LayerShape(kernel.shape[1], kernel.shape[0])}, ""


class PackedProjection(FlixLinear):
    """The projections of an adapted attention: a layer that is no module of the model.

    Args:
        module: the attention, whose parameters its kernel and bias are.
    """

    module: Any

    def __init__(
        self, module: nn.MultiheadAttention, name: str, place: int, state: FlixState
    ) -> None:
        nn.Module.__init__(self)
        vars(self)["module"] = module  # not a child: the attention is its parent
        carry(self, name, place, state, nn.Linear)
        self.training = module.training

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return self.module.in_proj_weight

    @property
    def bias(self) -> Any:  # type: ignore[override]
        return self.module.in_proj_bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.module.in_proj_weight = value
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"in_features={self.d_in}, out_features={self.d_out}, bias={self.bias is not None}"

    def _kept(self, x: Tensor) -> Token | None:
        return None

    def _prepared(self, given: Tensor, x: Tensor, routing: Any) -> Token | None:
        return None


class FlixAttention(nn.MultiheadAttention):
    """What ``nn.MultiheadAttention`` becomes where one of its projections is adapted."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``'s, each row under its own features.

        Raises:
            RoutingError: no routing, routing that does not fit, or an input without a batch where rows differ.
        """
        layer = self._layer()
        routing = layer._routing(None, None)
        if routing is None:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        single = query.dim() == 2
        if single and routing.alone() is None:
            raise messages.no_batch(layer.flix_name, list(query.shape))
        q, k, v = self._projected(query, key, value, routing.watch)
        if single and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        y, weights = self._attended(
            q, k, v, key_padding_mask, attn_mask, need_weights=need_weights, is_causal=is_causal
        )
        y = self._turned(self.out_proj(y), single)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if single else weights
        return y, weights

    def train(self, mode: bool = True) -> FlixAttention:
        super().train(mode)
        for kernel in vars(self)[KERNELS].values():
            kernel.training = mode
        return self

    def _layer(self) -> Any:
        return next(iter(vars(self)[KERNELS].values()), self.out_proj)

    def _turned(self, x: Tensor, single: bool) -> Tensor:
        """``[N, L, d]`` as the caller has it, and back."""
        if single:
            return x[0]
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, watch: Any) -> list[Tensor]:
        """Queries ``[N, L, d]``, and keys and values ``[N, S, d]``."""
        if key.shape != value.shape:
            raise ValueError(
                f"keys {list(key.shape)} and values {list(value.shape)} differ in shape"
            )
        packed = vars(self)[KERNELS].get(PACKED)
        known: dict[int, tuple[Tensor, ...]] = {}
        found = []
        for part, x in enumerate((query, key, value)):
            if id(x) not in known:
                rows = x[None] if x.dim() == 2 else (x if self.batch_first else x.transpose(0, 1))
                if watch is not None and rows is not x:
                    watch.set_rows_first(rows)
                y = (
                    F.linear(rows, self.in_proj_weight, self.in_proj_bias)
                    if packed is None
                    else packed.forward(rows)
                )
                known[id(x)] = y.chunk(3, -1)
            found.append(known[id(x)][part])
        return found

    def _attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        *,
        need_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What queries get of the values, ``[N, L, d]``, and the weights ``[N, heads, L, S]`` where they are wanted."""
        if is_causal and mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which must be given too")
        count, _, size = q.shape
        hint = is_causal and padding is None and not need_weights
        wanted = None if hint else self._mask(mask, padding, q, k.shape[1])
        if self.bias_k is not None:
            assert self.bias_v is not None
            k = torch.cat([k, self.bias_k.expand(count, 1, size).to(k.dtype)], 1)
            v = torch.cat([v, self.bias_v.expand(count, 1, size).to(v.dtype)], 1)
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        more = k.shape[2] - (0 if wanted is None else wanted.shape[-1])
        if wanted is not None and more:  # what is added is seen by all
            wanted = F.pad(wanted, (0, more))
        weights = None
        if need_weights:
            scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(2, 3))
            scores = scores if wanted is None else scores + wanted
            weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
            y = torch.matmul(weights, v)
        else:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, wanted, dropout, is_causal=hint)
        return y.transpose(1, 2).flatten(2), weights

    def _mask(
        self, mask: Tensor | None, padding: Tensor | None, q: Tensor, keys: int
    ) -> Tensor | None:
        """Both masks as what is added to the scores, ``[N or 1, heads or 1, L or 1, S]``."""
        count, length = q.shape[:2]
        found = None
        if mask is not None:
            sizes = {2: (length, keys), 3: (count * self.num_heads, length, keys)}.get(mask.dim())
            if mask.shape != sizes:
                raise ValueError(
                    f"attn_mask is {list(mask.shape)}; it must be [{length}, {keys}], or "
                    f"[{count * self.num_heads}, {length}, {keys}], one for each head of each row"
                )
            lead = (1, 1) if mask.dim() == 2 else (count, self.num_heads)
            found = _additive(mask, q.dtype).view(*lead, length, keys)
        if padding is not None:
            if padding.shape != (count, keys):
                raise ValueError(
                    f"key_padding_mask is {list(padding.shape)}; it must be [{count}, {keys}]"
                )
            own = _additive(padding, q.dtype)[:, None, None, :]
            found = own if found is None else found + own
        return found


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"masks are of bool or of a floating dtype, got {mask.dtype}")
    return mask.to(dtype)


def become_attention(module: nn.MultiheadAttention) -> None:
    """Let an attention compute by its adapted projections.

    Raises:
        TargetError: it is none that this computes as.
    """
    if reason := attention_of(module)[1]:
        raise TargetError(f"nn.MultiheadAttention cannot be adapted: {reason}")
    if not isinstance(module, FlixAttention):
        module.__class__ = FlixAttention
        vars(module)[KERNELS] = {}
        rebind(module, nn.MultiheadAttention)


def become_packed(
    module: nn.Module, parameter: str, name: str, place: int, state: FlixState
) -> PackedProjection:
    """Adapt the packed projections of an attention, in place.

    Raises:
        TargetError: they cannot be adapted.
    """
    kernels, reason = attention_of(module)
    if parameter not in kernels:
        raise TargetError(f"layer {name!r} cannot be adapted: {reason or 'it has no such kernel'}")
    assert isinstance(module, nn.MultiheadAttention)
    become_attention(module)
    made = vars(module)[KERNELS][parameter] = PackedProjection(module, name, place, state)
    return made


def revert_attention(module: Any) -> None:
    """Turn an adapted attention back into the plain module it was, in place; its ``out_proj`` is one already."""
    for kernel in vars(module).pop(KERNELS).values():
        if "flix_kernel" in vars(kernel):  # merged in place: the base's own kernel comes back
            kernel.weight = vars(kernel)["flix_kernel"]
    module.__class__ = nn.MultiheadAttention
    rebind(module, FlixAttention)
