"""Adapted layers: what nn.Linear, transformers' Conv1D and nn.Embedding become (SPEC §1 and §5)."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flix.backends.torch._context import DevicePlan, TracedRouting
from flix.backends.torch._layer import FlixLayer, with_grad
from flix.backends.torch._ops import RoutedLinear, traced_linear
from flix.core.config import FlixConfig
from flix.core.errors import TargetError
from flix.core.layout import LayerLayout, choose_strategy


class FlixLinear(FlixLayer, nn.Linear):
    """A frozen linear map plus each row's own sum of low-rank updates (SPEC §1).

    In a model, ``adapt`` turns the targets into this class. By hand::

        layer = FlixLinear(768, 768, config=config, name="q")
        y = layer(x, flix_features=ids, flix_weights=None)

    Args:
        in_features: d_in.
        out_features: d_out.
        bias: whether there is a bias.
        config: the configuration; its ranks and seed are used.
        name: the layer's path, which ranks, initial values and messages go by.
        strategy: ``"auto"``, ``"gather"``, ``"masked"`` or ``"single"``.
        device, dtype: of the frozen kernel.

    Raises:
        ConfigError: an unknown strategy.
    """

    # Whether the kernel is stored [d_in, d_out], as transformers' Conv1D has it, or [d_out, d_in].
    flix_transposed = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: FlixConfig,
        name: str = "linear",
        strategy: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.flix_base = nn.Linear
        self.attach(config, name, strategy)

    @property
    def d_in(self) -> int:
        return int(self.weight.shape[0 if self.flix_transposed else 1])

    @property
    def d_out(self) -> int:
        return int(self.weight.shape[1 if self.flix_transposed else 0])

    def _plain(self, x: Tensor) -> Tensor:
        if not self.flix_transposed:
            return F.linear(x, self.weight, self.bias)
        y = torch.addmm(self.bias, x.reshape(-1, self.d_in), self.weight)
        return y.view(*x.shape[:-1], self.d_out)

    def forward(self, x: Tensor, flix_features: Any = None, flix_weights: Any = None) -> Tensor:
        """The adapted map.

        Args:
            x: ``[B, ..., d_in]``.
            flix_features: int ``[B, W]`` or ``[B, T, W]``; default: the routing in force.
            flix_weights: float in that shape; default 1.

        Returns:
            ``[B, ..., d_out]``.

        Raises:
            RoutingError: no routing in training, or routing that does not fit x.
        """
        routing = self._routing(flix_features, flix_weights)
        if routing is None:
            return self._plain(x)
        x, count, length = self._grouped(x, routing, trailing=1)
        lead = x.shape[:-1]
        strategy = choose_strategy(self.flix_strategy, examples=count, tokens=length)
        if isinstance(routing, TracedRouting):
            y = self._traced(x.reshape(count, length, x.shape[-1]), routing, strategy)
            return y.reshape(*lead, self.d_out)
        plan = self._device_plan(x, routing, strategy)
        if not plan.active or count == 0:
            return with_grad(self._plain(x), self.training)
        kernel, bias = self.weight, self.bias
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x, kernel = x.to(dtype), kernel.to(dtype)
            bias = None if bias is None else bias.to(dtype)  # type: ignore[assignment]
            with torch.autocast(device, enabled=False):
                y = self._routed(x, kernel, bias, plan, strategy, count, length)
        else:
            y = self._routed(x, kernel, bias, plan, strategy, count, length)
        return y.view(*lead, self.d_out)

    def _routed(
        self,
        x: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        plan: DevicePlan,
        strategy: str,
        count: int,
        length: int,
    ) -> Tensor:
        return RoutedLinear.apply(  # type: ignore[no-any-return, no-untyped-call]
            x.reshape(count, length, x.shape[-1]),
            kernel if self.flix_transposed else kernel.t(),
            bias,
            plan.scale.to(x.dtype),
            plan.rows,
            strategy,
            *self._params(plan.active),
        )

    def _traced(self, x: Tensor, routing: TracedRouting, strategy: str) -> Tensor:
        base = self._plain(x)
        params = [(a, b) for _, a, b in self.pairs()]
        if not params:
            return base
        rows, scale = self._traced_plan(x, routing)
        x = x.to(base.dtype)
        a = torch.cat([a for a, _ in params]).to(base.dtype)
        b = torch.cat([b.t() for _, b in params]).to(base.dtype)
        return traced_linear(x, base, scale.to(base.dtype), rows, a, b, strategy)


class FlixConv1D(FlixLinear):
    """transformers' Conv1D, adapted: a linear map whose kernel is stored ``[d_in, d_out]``."""

    flix_transposed = True


class FlixEmbedding(FlixLayer, nn.Embedding):
    """A frozen embedding plus each row's own sum: y = E0[t] + Σ w s B_f A_f[:, t] (SPEC §1).

    By hand: ``FlixEmbedding(vocabulary, size, config=config, name="embed")``, called as :class:`FlixLinear`.

    Args:
        num_embeddings: the vocabulary's size, d_in.
        embedding_dim: d_out.
        config: the configuration; its ranks and seed are used.
        name: the layer's path.
        kwargs: nn.Embedding's (``padding_idx``, ``device``, ``dtype``).
    """

    flix_kind = "embedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        config: FlixConfig,
        name: str = "embedding",
        strategy: str = "auto",
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        if self.max_norm is not None:
            raise TargetError(
                "an embedding with max_norm rewrites its kernel; it cannot be adapted"
            )
        self.flix_base = nn.Embedding
        self.attach(config, name, strategy)

    @property
    def d_in(self) -> int:
        return int(self.weight.shape[0])

    @property
    def d_out(self) -> int:
        return int(self.weight.shape[1])

    def forward(self, x: Tensor, flix_features: Any = None, flix_weights: Any = None) -> Tensor:  # type: ignore[override]
        """The adapted lookup: token ids ``[B, ...]`` to ``[B, ..., d_out]``; otherwise as FlixLinear's."""
        routing = self._routing(flix_features, flix_weights)
        if routing is None:
            return nn.Embedding.forward(self, x)
        x, count, length = self._grouped(x, routing, trailing=0)
        base = nn.Embedding.forward(self, x)
        tokens = x.reshape(count, length)
        if isinstance(routing, TracedRouting):
            return base + self._traced(tokens, routing, base.dtype).view_as(base)
        strategy = choose_strategy(self.flix_strategy, examples=count, tokens=length)
        plan = self._device_plan(x, routing, strategy)
        if not plan.active or count == 0:
            return with_grad(base, self.training)
        return base + self._sum(tokens, plan, base.dtype).view_as(base)

    def _sum(self, tokens: Tensor, plan: DevicePlan, dtype: torch.dtype) -> Tensor:
        """Feature by feature, over the rows that use it: A is as wide as the vocabulary, too large to stack."""
        features = self.flix_config.registry.features
        total = tokens.new_zeros(*tokens.shape, self.d_out, dtype=dtype)
        start = 0
        for i in plan.active:
            a, b = self.flix_A[features[i]], self.flix_B[features[i]]
            # The factor of a feature stands at the slots that hold the first row of its A.
            first = (plan.rows == start) & (plan.scale.detach() != 0)
            if plan.scale.requires_grad:
                first = plan.rows == start  # a weight of 0 may still want its gradient
            factor = torch.where(first, plan.scale, torch.zeros_like(plan.scale)).sum(1)
            users = first.any(1).nonzero().squeeze(1)
            start += a.shape[0]
            h = F.embedding(tokens[users], a.t()).to(dtype)
            part = (h * factor[users, None, None].to(dtype)) @ b.t().to(dtype)
            total = total.index_add(0, users, part)
        return total

    def _traced(self, tokens: Tensor, routing: TracedRouting, dtype: torch.dtype) -> Tensor:
        params = [(a, b) for _, a, b in self.pairs()]
        if not params:
            return tokens.new_zeros(*tokens.shape, self.d_out, dtype=dtype)
        rows, scale = self._traced_plan(self.weight, routing)
        a = torch.cat([a for a, _ in params]).to(dtype)
        b = torch.cat([b.t() for _, b in params]).to(dtype)
        mask = torch.zeros(scale.shape[0], a.shape[0], dtype=scale.dtype, device=scale.device)
        mask = mask.scatter_add(1, rows, scale).to(dtype)
        h = F.embedding(tokens, a.t()) * mask[:, None, :]
        return torch.matmul(h, b)


def _conv1d_class() -> type[nn.Module] | None:
    """transformers' Conv1D, if transformers is loaded (a model that has one has loaded it)."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def adaptable(module: nn.Module) -> tuple[type[FlixLayer] | None, str]:
    """The class that an unadapted module becomes, or None with the reason (empty for other kinds of modules)."""
    if isinstance(module, FlixLayer):
        return None, "it is adapted already"
    conv1d = _conv1d_class()
    for base, target in (
        (nn.Linear, FlixLinear),
        (nn.Embedding, FlixEmbedding),
        (conv1d, FlixConv1D),
    ):
        if base is None or not isinstance(module, base):
            continue
        if "forward" in vars(module):
            return None, "its forward is patched on the instance (as accelerate's dispatch does)"
        if type(module) is not base:
            return None, f"its class {type(module).__name__} has a forward of its own"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return None, "an embedding with max_norm rewrites its kernel"
        return target, ""
    return None, ""


def become(
    module: nn.Module, config: FlixConfig, name: str, strategy: str, layout: LayerLayout
) -> None:
    """Turn a plain layer into its adapted class, in place: references, hooks and sharing stay as they are."""
    target, reason = adaptable(module)
    if target is None:
        raise TargetError(f"layer {name!r} cannot be adapted: {reason or type(module).__name__}")
    base = type(module)
    module.__class__ = target  # type: ignore[assignment]
    assert isinstance(module, FlixLayer)
    module.flix_base = base
    module.attach(config, name, strategy, layout)


def revert(module: FlixLayer) -> None:
    """Turn an adapted layer back into the plain layer it was, in place."""
    base = module.flix_base
    for name in ("flix_A", "flix_B"):
        delattr(module, name)
    for name in [key for key in vars(module) if key.startswith("flix_")]:
        delattr(module, name)
    module.__class__ = base  # type: ignore[assignment]
