"""Adapted layers: what nn.Linear, transformers' Conv1D and nn.Embedding become (docs/specification.md §1.1, §5.2)."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flix.backends.torch._context import ActiveRouting, AnyRouting, DevicePlan, TracedRouting
from flix.backends.torch._layer import FlixLayer, with_grad
from flix.backends.torch._ops import RoutedLinear, routed_forward, stack, traced_linear
from flix.backends.torch._scaled import is_scaled_embedding, scaled
from flix.backends.torch.kernels.choice import strategy_for
from flix.backends.torch.kernels.operators import routed_linear
from flix.backends.torch.kernels.routes import routes
from flix.core.adapter.adapter import Adapter
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.errors import TargetError


class FlixLinear(FlixLayer, nn.Linear):
    """A frozen linear map plus each row's own sum of low-rank updates (docs/specification.md §1.1).

    In a model, ``adapt`` turns the targets into this class. By hand::

        layer = FlixLinear(768, 768, config=config, name="q")
        y = layer(x, flix_features=ids, flix_weights=None)

    Args:
        in_features: d_in.
        out_features: d_out.
        bias: whether there is a bias.
        config: the configuration; its ranks and seed are used.
        name: the layer's path, which ranks, initial values and messages go by.
        strategy: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
        device, dtype: of the frozen kernel.

    Raises:
        ConfigError: an unknown strategy, or ``"fused"`` without Triton.
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

    def _base(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        if not self.flix_transposed:
            return F.linear(x, kernel, bias)
        y = torch.addmm(bias, x.reshape(-1, self.d_in), kernel)  # type: ignore[arg-type]
        return y.view(*x.shape[:-1], self.d_out)

    def _plain(self, x: Tensor) -> Tensor:
        return self._base(x, self.weight, self.bias)

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
            ConfigError: ``"single"`` for rows that differ; ``"fused"`` where it cannot run.
        """
        routing = self._routing(flix_features, flix_weights)
        if routing is None:
            return self._plain(x)
        x, count, length = self._grouped(x, routing, trailing=1)
        lead = x.shape[:-1]
        device = x.device.type
        if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
            y = self._sum(x.reshape(count, length, x.shape[-1]), self.weight, self.bias, routing)
        else:
            dtype = torch.get_autocast_dtype(device)
            kernel = self.weight.to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            with torch.autocast(device, enabled=False):
                y = self._sum(
                    x.to(dtype).reshape(count, length, x.shape[-1]), kernel, bias, routing
                )
        return y.view(*lead, self.d_out)

    def _sum(self, x: Tensor, kernel: Tensor, bias: Tensor | None, routing: AnyRouting) -> Tensor:
        if isinstance(routing, TracedRouting):
            return self._traced(x, kernel, bias, routing)
        return self._eager(x, kernel, bias, routing)

    def _eager(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None, routing: ActiveRouting
    ) -> Tensor:
        """``[N, S, d_out]`` from x ``[N, S, d_in]``, by a plan made on the host."""
        count, length, _ = x.shape
        plan = self._device_plan(x, routing)
        # A token of a generation: the union stays stacked until the next.
        token = length == 1 and not torch.is_grad_enabled()
        strategy = strategy_for(
            self.flix_strategy, x, rows=plan.rows.shape[1], union=plan.union, stacked=token
        )
        self._check_single(routing, strategy)
        if not plan.active or count == 0:
            return with_grad(self._base(x, kernel, bias), self.training)
        params = self._params(plan.active, routing, x.device)
        straight = kernel if self.flix_transposed else kernel.t()
        if strategy == "fused":
            half = len(params) // 2
            y: Tensor = routed_linear(
                x,
                straight,
                bias,
                plan.scale,
                *plan.grouped(),
                params[:half],
                params[half:],
                strategy,
            )[0]
            return y
        scale = plan.scale.to(x.dtype)
        if strategy == "masked" and token:
            return self._step(x, straight, bias, scale, plan, params)
        return RoutedLinear.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, straight, bias, scale, plan, strategy, *params
        )

    def _step(
        self,
        x: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        plan: DevicePlan,
        params: list[Tensor],
    ) -> Tensor:
        """One token of a generation: the same plan and parameters as at the last one, stacked already."""
        union = None
        if not any(p.is_inference() for p in params):  # those do not say when they change
            union = plan.stack(self, x.dtype, params, lambda: stack(params, x.dtype))
        factor = plan.mask(x.dtype)
        y, _ = routed_forward(
            x, kernel, bias, scale, plan.rows, "masked", params, factor=factor, union=union
        )
        return y

    def _traced(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None, routing: TracedRouting
    ) -> Tensor:
        """The same inside a compiled graph, where ids are known to the running graph alone."""
        params = [(a, b) for _, a, b in self.pairs()]
        width = routing.flat.shape[1]
        if not params or width == 0:
            return self._base(x, kernel, bias)
        layout = self.flix_layout
        most = width * max(layout.ranks)
        strategy = strategy_for(self.flix_strategy, x, rows=most, union=None)
        a: list[Tensor] = [a for a, _ in params]
        b: list[Tensor] = [b for _, b in params]
        if strategy != "fused" and x.device.type != "cpu":
            # No kernels here, and reading the ids on the host would stall the device.
            rows, scale = self._traced_plan(x, routing)
            bank_a, bank_b = torch.cat(a).to(x.dtype), torch.cat([p.t() for p in b]).to(x.dtype)
            base = self._base(x, kernel, bias)
            return traced_linear(x, base, scale.to(x.dtype), rows, bank_a, bank_b, strategy)
        grouped = strategy == "fused" and torch.is_grad_enabled()
        rows, slots, scale, order, starts = routes(
            routing.flat, layout.ranks, layout.scales, x.dtype == torch.float64, grouped
        )
        if routing.weights is not None:
            scale = routing.weights.to(scale.dtype).gather(1, slots) * scale
        straight = kernel if self.flix_transposed else kernel.t()
        y: Tensor = routed_linear(x, straight, bias, scale, rows, order, starts, a, b, strategy)[0]
        return y


class FlixConv1D(FlixLinear):
    """transformers' Conv1D, adapted: a linear map whose kernel is stored ``[d_in, d_out]``."""

    flix_transposed = True

    def extra_repr(self) -> str:
        # nn.Linear's reads attributes that Conv1D does not have.
        return f"in_features={self.d_in}, out_features={self.d_out}, bias={self.bias is not None}"


class FlixEmbedding(FlixLayer, nn.Embedding):
    """A frozen embedding plus each row's own sum: y = E0[t] + Σ w s B_f A_f[:, t] (docs/specification.md §1.1).

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
            return self._scaled(nn.Embedding.forward(self, x))
        x, count, length = self._grouped(x, routing, trailing=0)
        base = nn.Embedding.forward(self, x)
        tokens = x.reshape(count, length)
        if isinstance(routing, TracedRouting):
            return self._scaled(base + self._traced(tokens, routing, base.dtype).view_as(base))
        plan = self._device_plan(x, routing)
        self._check_single(routing, self.flix_strategy)
        if not plan.active or count == 0:
            return with_grad(self._scaled(base), self.training)
        params = self._params(plan.active, routing, base.device)
        return self._scaled(base + self._sum(tokens, plan, params, base.dtype).view_as(base))

    def _scaled(self, y: Tensor) -> Tensor:
        """What transformers' scaled embeddings do to the looked-up row; the update is scaled with its kernel."""
        return scaled(self, y)

    def _sum(
        self, tokens: Tensor, plan: DevicePlan, params: list[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Feature by feature, over the rows that use it: A is as wide as the vocabulary, too large to stack."""
        total = tokens.new_zeros(*tokens.shape, self.d_out, dtype=dtype)
        start, half = 0, len(plan.active)
        for a, b in zip(params[:half], params[half:], strict=True):
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
        if type(module) is not base and not is_scaled_embedding(module):
            return None, f"its class {type(module).__name__} has a forward of its own"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return None, "an embedding with max_norm rewrites its kernel"
        return target, ""
    return None, ""


def become(
    module: nn.Module,
    config: FlixConfig,
    name: str,
    strategy: str,
    layout: LayerLayout,
    adapter: Adapter | None = None,
) -> None:
    """Turn a plain layer into its adapted class, in place: references, hooks and sharing stay as they are."""
    target, reason = adaptable(module)
    if target is None:
        raise TargetError(f"layer {name!r} cannot be adapted: {reason or type(module).__name__}")
    base = type(module)
    module.__class__ = target  # type: ignore[assignment]
    assert isinstance(module, FlixLayer)
    module.flix_base = base
    module.attach(config, name, strategy, layout, adapter)


def revert(module: FlixLayer) -> None:
    """Turn an adapted layer back into the plain layer it was, in place."""
    base = module.flix_base
    if "flix_kernel" in vars(module):  # merged in place: the base's own kernel comes back
        module.weight = vars(module)["flix_kernel"]
    for name in ("flix_A", "flix_B"):
        delattr(module, name)
    for name in [key for key in vars(module) if key.startswith("flix_")]:
        delattr(module, name)
    module.__class__ = base  # type: ignore[assignment]
