"""Adapted layers: what nn.Linear, transformers' Conv1D and nn.Embedding become (docs/specification.md §1.1, §5.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flix.backends.torch.added import added
from flix.backends.torch.kernels.choice import require_triton, strategy_for
from flix.backends.torch.kernels.operators import routed_linear
from flix.backends.torch.kernels.routes import used
from flix.backends.torch.layer import FlixLayer, with_grad
from flix.backends.torch.parameters import BANK, Bank, Values
from flix.backends.torch.placing import Placed
from flix.backends.torch.routing import ActiveRouting, AnyRouting, TracedRouting, current
from flix.backends.torch.rows import noted, rows_of
from flix.backends.torch.scaled import scaled
from flix.backends.torch.state import FlixState
from flix.backends.torch.sums import RoutedLinear, stack, summed, traced_linear
from flix.backends.torch.tokens import Token
from flix.core.adapter.changes import fresh_pairs
from flix.core.adapter.flat import flat_layout
from flix.core.config.config import FlixConfig
from flix.core.errors import TargetError
from flix.core.strategy.decide import check_strategy


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
        name: the layer's path, which determines ranks and initial values, and which messages use.
        strategy: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
        device, dtype: of the frozen kernel.

    Raises:
        ConfigError: an unknown strategy, or ``"fused"`` without Triton.
    """

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
        self.flix_base: type[nn.Module] = nn.Linear
        _hold_bank(self, config, name, strategy)

    def _base(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        if not self.flix_transposed:
            return F.linear(x, kernel, bias)
        y = torch.addmm(bias, x.reshape(-1, self.d_in), kernel)  # type: ignore[arg-type]
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
            ConfigError: ``"single"`` with rows that differ; ``"fused"`` where it cannot run.
        """
        rate = self._dropped()
        if not (
            rate or flix_features is not None or flix_weights is not None or torch.is_grad_enabled()
        ):
            token = self._kept(x)
            if token is not None:
                return self._by(token, x)
        routing = self._routing(flix_features, flix_weights)
        if routing is None:
            return self._base(x, self.weight, self.bias)
        given = x
        x, count, length, routing = rows_of(self, x, routing, trailing=1)
        lead, device = x.shape[:-1], x.device.type
        x = x.reshape(count, length, x.shape[-1])
        if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
            token = None if rate else self._prepared(given, x, routing)
            if token is not None:
                return self._by(token, given)
            y = self._sum(x, self.weight, self.bias, routing)
        else:
            dtype = torch.get_autocast_dtype(device)
            kernel = self.weight.to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            with torch.autocast(device, enabled=False):
                y = self._sum(x.to(dtype), kernel, bias, routing)
        return noted(self, y.view(*lead, self.d_out), routing)

    def _kept(self, x: Tensor) -> Token | None:
        """What the layer prepared for such an input under this routing."""
        routing, state = current.routing, self.flix_state
        if type(routing) is not ActiveRouting or routing.entered is not state:
            return None
        token = routing.tokens.get(self.flix_place)
        return token if token is not None and token.fits(x) else None

    def _prepared(self, given: Tensor, x: Tensor, routing: AnyRouting) -> Token | None:
        """A sum that is kept for the tokens to come; None where the input is no token of a generation."""
        if torch.is_grad_enabled() or not isinstance(routing, ActiveRouting) or 0 in x.shape:
            return None
        if routing.entered is not self.flix_state or not (x.shape[1] == 1 or routing.lead == ()):
            return None
        if given.numel() != x.numel():
            return None
        placed = self._placed(x, routing)
        alike = routing.compositions()
        strategy = placed.strategy(self.flix_strategy, x, kept=alike.count)
        self._check_single(routing, strategy)
        if strategy == "fused" or not placed.active:
            return None
        values, _ = self._values(placed, routing, x.device)
        token = Token(given, self.d_out, placed, values, alike, strategy)
        routing.tokens[self.flix_place] = token
        return token

    def _by(self, token: Token, x: Tensor) -> Tensor:
        held = self._parameters
        y = self._base(x, held["weight"], held["bias"])  # type: ignore[arg-type]
        token.add(x, y)
        return y

    def _sum(self, x: Tensor, kernel: Tensor, bias: Tensor | None, routing: AnyRouting) -> Tensor:
        if rate := self._dropped():
            return added(self, F.dropout(x, rate), self._base(x, kernel, bias), routing)
        if isinstance(routing, TracedRouting):
            return self._traced(x, kernel, bias, routing)
        return self._eager(x, kernel, bias, routing)

    def _eager(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None, routing: ActiveRouting
    ) -> Tensor:
        """``[N, S, d_out]`` from x ``[N, S, d_in]``, with ids that are known on the host."""
        placed = self._placed(x, routing)
        strategy = placed.strategy(self.flix_strategy, x)
        self._check_single(routing, strategy)
        if not placed.active or x.shape[0] == 0:
            return with_grad(self._base(x, kernel, bias), self.training)
        straight = kernel if self.flix_transposed else kernel.t()
        if strategy == "fused":
            return self._open(self._fused(x, straight, bias, placed, routing), self.training)
        values, carrier = self._values(placed, routing, x.device)
        scale = placed.scale.to(x.dtype)
        y = RoutedLinear.apply(  # type: ignore[no-untyped-call]
            x, straight, bias, scale, carrier, placed, strategy, values
        )
        return self._open(y, self.training)

    def _fused(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None, placed: Placed, routing: ActiveRouting
    ) -> Tensor:
        # Triton is loaded when it is needed.
        from flix.backends.torch.kernels.eager import FusedLinear

        found, place = routing.in_force(self.flix_state), self.flix_place
        return FusedLinear.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, kernel, bias, placed.scale, found.carrier(place), placed, found, place
        )

    def _traced(
        self, x: Tensor, kernel: Tensor, bias: Tensor | None, routing: TracedRouting
    ) -> Tensor:
        """The same inside a compiled graph, where ids are known to the running graph alone."""
        layout, width = self.flix_layout, routing.flat.shape[1]
        if not any(layout.ranks) or width == 0:
            return self._base(x, kernel, bias)
        most = width * max(layout.ranks)
        strategy = strategy_for(self.flix_strategy, x, rows=most, union=None)
        a, b = self._traced_pairs(routing)
        grouped = strategy == "fused" and torch.is_grad_enabled()
        rows, scale, *order = self._traced_slots(routing, x, grouped)
        plain = not torch.compiler.is_compiling()
        if plain or (strategy != "fused" and x.device.type != "cpu"):
            # No kernels here, and reading the ids on the host would stall the device (or cannot be, under torch.func).
            base, dtype = self._base(x, kernel, bias), x.dtype
            bank = stack((a, b), self.d_in, self.d_out, dtype, end=1)
            rows = used(rows, len(bank[0]) - 1)
            return traced_linear(x, base, scale.to(dtype), rows, *bank, strategy)
        straight = kernel if self.flix_transposed else kernel.t()
        y: Tensor = routed_linear(x, straight, bias, scale, rows, *order, a, b, strategy)[0]
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

    flix_kind: str = "embedding"
    flix_transposed: bool = True

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
        self.flix_base: type[nn.Module] = nn.Embedding
        _hold_bank(self, config, name, strategy)

    def forward(self, x: Tensor, flix_features: Any = None, flix_weights: Any = None) -> Tensor:  # type: ignore[override]
        """The adapted lookup, from token ids ``[B, ...]`` to ``[B, ..., d_out]``; otherwise as in FlixLinear."""
        routing = self._routing(flix_features, flix_weights)
        if routing is None:
            return self._scaled(nn.Embedding.forward(self, x))
        x, count, length, routing = rows_of(self, x, routing, trailing=0)
        base = nn.Embedding.forward(self, x)
        tokens = x.reshape(count, length)
        # Lookups are no products: autocast leaves them in the kernel's dtype.
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(routing, TracedRouting):
                return self._scaled(base + self._traced(tokens, routing, base.dtype).view_as(base))
            placed = self._placed(x, routing)
            self._check_single(routing, self.flix_strategy)
            if not placed.active or count == 0:
                return with_grad(self._scaled(base), self.training)
            pairs = self._pairs_of(*self._values(placed, routing, base.device))
            y = base + self._sum(tokens, placed, pairs, base.dtype).view_as(base)
            return noted(self, self._open(self._scaled(y), self.training), routing)

    def _scaled(self, y: Tensor) -> Tensor:
        """What transformers' scaled embeddings do to the looked-up row; the update is scaled with its kernel."""
        return scaled(self, y)

    def _sum(self, tokens: Tensor, placed: Placed, pairs: Values, dtype: torch.dtype) -> Tensor:
        """Feature by feature, over the rows that use it: A is as wide as the vocabulary, too large to stack."""
        total = tokens.new_zeros(*tokens.shape, self.d_out, dtype=dtype)
        start = 0
        for a, b in zip(*pairs, strict=True):
            # The factor of a feature stands at the slots that hold the first row of its A.
            first = (placed.rows == start) & (placed.scale.detach() != 0)
            if placed.scale.requires_grad:
                first = placed.rows == start  # a weight of 0 may still want its gradient
            factor = torch.where(first, placed.scale, torch.zeros_like(placed.scale)).sum(1)
            users = first.any(1).nonzero().squeeze(1)
            start += a.shape[0]
            h = F.embedding(tokens[users], a.t()).to(dtype)
            own = factor[users, None, None].to(dtype)
            if placed.live is None:
                part = (h * own) @ b.to(dtype)
            else:  # a factor of 0 selects, whatever the values are, and has a gradient all the same
                u = h @ b.to(dtype)
                part = torch.where(own == 0, u.nan_to_num() * own, u * own)
            total = total.index_add(0, users, part)
        return total

    def _traced(self, tokens: Tensor, routing: TracedRouting, dtype: torch.dtype) -> Tensor:
        pairs = self._traced_pairs(routing)
        if not pairs[0]:
            return tokens.new_zeros(*tokens.shape, self.d_out, dtype=dtype)
        rows, scale, *_ = self._traced_slots(routing, self.weight)
        a, b = stack(pairs, self.d_in, self.d_out, dtype, end=1)
        own = used(rows, len(b) - 1)
        h = F.embedding(tokens, a.t()).gather(2, own[:, None, :].expand(-1, tokens.shape[1], -1))
        return summed(h, scale.to(dtype), b[own])


def carry(layer: FlixLayer, name: str, place: int, state: FlixState, base: type[nn.Module]) -> None:
    """Give an adapted layer its name, its place and its model's state."""
    vars(layer).update(
        flix_name=name,
        flix_place=place,
        flix_state=state,
        flix_strategy=state.strategy,
        flix_base=base,
    )


def _hold_bank(layer: FlixLayer, config: FlixConfig, name: str, strategy: str) -> None:
    """Give a layer that is used by hand features of its own, with their initial values, and freeze its base."""
    check_strategy(strategy)
    require_triton(strategy)
    layer.requires_grad_(False)
    kernel: Tensor = layer.weight  # type: ignore[assignment]
    shape, registry = layer.shape_of(layer), config.registry
    bank = Bank(registry.features, flat_layout(config, {name: shape})).to(kernel.device)
    dtype = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    bank.receive([(name, fresh_pairs(config, name, shape))], registry.live, dtype, kernel.device)
    carry(layer, name, 0, FlixState(config, bank, strategy), layer.flix_base)
    layer._modules[BANK] = bank
