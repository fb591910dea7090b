"""What all adapted layers share: the features' parameters, and how routing reaches a layer."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flix.backends.torch._context import (
    ActiveRouting,
    AnyRouting,
    DevicePlan,
    TracedRouting,
    current,
    make_routing,
)
from flix.backends.torch.kernels.choice import require_triton
from flix.core.adapter.adapter import Adapter
from flix.core.adapter.initial import initial_a, initial_b, initial_table
from flix.core.config.config import FlixConfig
from flix.core.config.layout import LayerLayout
from flix.core.errors import ConfigError, RoutingError
from flix.core.features.registry import Feature
from flix.core.strategy.decide import check_strategy


@functools.lru_cache(maxsize=1 << 16)
def parameter_key(feature: Feature) -> str:
    """A feature's key among a layer's parameters.

    torch refuses "." in the names of parameters, and ":" parts group from name: names that hold them are escaped.
    """
    escaped = (part.replace("%", "%25").replace(".", "%2E").replace(":", "%3A") for part in feature)
    return ":".join(escaped)


@functools.lru_cache(maxsize=64)
def _keys(features: tuple[Feature, ...]) -> tuple[str, ...]:
    """The keys of a registry's features, by id."""
    return tuple(parameter_key(feature) for feature in features)


class FeatureParameters(nn.Module):
    """One parameter a feature, by feature; features of rank 0 have none."""

    def __getitem__(self, feature: Feature) -> nn.Parameter:
        return self._parameters[parameter_key(feature)]  # type: ignore[return-value]

    def __contains__(self, feature: Feature) -> bool:
        return parameter_key(feature) in self._parameters

    def hold(self, feature: Feature, parameter: nn.Parameter) -> None:
        """Set a feature's parameter."""
        self.register_parameter(parameter_key(feature), parameter)

    def clear(self) -> None:
        """Let go of every parameter."""
        self._parameters.clear()


class OnDevice(torch.autograd.Function):
    """Values on the device in the place of parameters on the host; the gradients go there in one copy."""

    @staticmethod
    def forward(ctx: Any, values: list[Tensor], *params: Tensor) -> tuple[Tensor, ...]:
        ctx.hosts = [p.device for p in params]
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        first = ctx.hosts[0]
        if any(host != first for host in ctx.hosts):  # a feature joined after the others were moved
            return (None, *(g.to(host) for g, host in zip(grads, ctx.hosts, strict=True)))
        if grads[0].device == first:
            return (None, *grads)
        whole = torch.cat([grad.reshape(-1) for grad in grads]).to(first)
        parts = whole.split([grad.numel() for grad in grads])  # type: ignore[no-untyped-call]
        return (None, *(part.view(g.shape) for part, g in zip(parts, grads, strict=True)))


class FlixLayer(nn.Module):
    """What all adapted layers share: the pairs of the features, and the way routing reaches them.

    Attributes:
        flix_name: the layer's path in its model.
        flix_config: the configuration.
        flix_A: A_f ``[r, d_in]`` of each feature.
        flix_B: B_f ``[d_out, r]`` of each feature.
        flix_strategy: ``"auto"``, ``"gather"``, ``"masked"``, ``"single"`` or ``"fused"``.
    """

    flix_kind = "linear"
    flix_name: str
    flix_config: FlixConfig
    flix_keys: tuple[str, ...]
    flix_layout: LayerLayout
    flix_strategy: str
    flix_base: type[nn.Module]
    flix_enabled: bool
    flix_A: FeatureParameters
    flix_B: FeatureParameters

    @property
    def d_in(self) -> int:
        """Input size; of an embedding, the vocabulary's."""
        raise TypeError("an adapted layer's class gives its sizes")

    @property
    def d_out(self) -> int:
        """Output size."""
        raise TypeError("an adapted layer's class gives its sizes")

    def attach(
        self,
        config: FlixConfig,
        name: str,
        strategy: str = "auto",
        layout: LayerLayout | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """Give the layer its features, with an adapter's values or initial ones; part of becoming an adapted layer."""
        check_strategy(strategy)
        require_triton(strategy)
        self.flix_name = name
        self.flix_strategy = strategy
        self.flix_enabled = True
        self.flix_A, self.flix_B = FeatureParameters(), FeatureParameters()
        self.weight.requires_grad_(False)
        if getattr(self, "bias", None) is not None:
            self.bias.requires_grad_(False)
        self.set_config(config, layout)
        self._add_pairs(adapter)

    def set_config(self, config: FlixConfig, layout: LayerLayout | None = None) -> None:
        """Set the configuration, and the layout that follows from it (given if it is known already)."""
        self.flix_config = config
        self.flix_keys = _keys(config.registry.features)
        self.flix_layout = layout or config.layout(self.flix_name)

    def _add_pairs(self, adapter: Adapter | None) -> None:
        """Make the parameters of all features."""
        ranks = self.flix_layout.ranks
        chosen = [
            (f, r) for f, r in zip(self.flix_config.registry.features, ranks, strict=True) if r
        ]
        if adapter is not None:
            self._put((f, *adapter.pair(self.flix_name, f)) for f, _ in chosen)
            return
        table = initial_table(
            seed=self.flix_config.seed,
            layer=self.flix_name,
            features=[feature for feature, _ in chosen],
            ranks=[rank for _, rank in chosen],
            d_in=self.d_in,
        )
        ends = itertools.accumulate(rank for _, rank in chosen)
        d_out = self.d_out
        self._put(
            (feature, table[end - rank : end], initial_b(rank=rank, d_out=d_out))
            for (feature, rank), end in zip(chosen, ends, strict=True)
        )

    def add_pair(self, feature: Feature) -> None:
        """Make the parameters of one feature, with their initial values; none where its rank is 0."""
        rank = self.flix_config.rank(self.flix_name, feature)
        if rank == 0:
            return
        a = initial_a(
            seed=self.flix_config.seed,
            layer=self.flix_name,
            group=feature[0],
            feature=feature[1],
            rank=rank,
            d_in=self.d_in,
        )
        self._put([(feature, a, initial_b(rank=rank, d_out=self.d_out))])

    def _put(self, pairs: Iterable[tuple[Feature, Any, Any]]) -> None:
        """Set features' pairs to copies of arrays."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        # Pairs of a half-precision base are kept in float32, where small updates do not round away.
        wide = np.float64 if weight.dtype == torch.float64 else np.float32
        device = None if weight.device.type == "cpu" else weight.device
        # Straight into the dictionaries, and by way of numpy, whose copies cost a fraction of torch's: a large model
        # has these by the hundred thousand.
        bank_a, bank_b = self.flix_A._parameters, self.flix_B._parameters
        for feature, a, b in pairs:
            key = parameter_key(feature)
            for bank, value in ((bank_a, a), (bank_b, b)):
                copied = torch.from_numpy(np.array(value, wide))
                bank[key] = nn.Parameter(copied if device is None else copied.to(device))

    def pairs(self) -> Iterator[tuple[Feature, nn.Parameter, nn.Parameter]]:
        """(feature, A, B) of every feature with an update in this layer."""
        a, b = self.flix_A._parameters, self.flix_B._parameters
        for feature, key in zip(self.flix_config.registry.features, self.flix_keys, strict=True):
            if key in a:
                yield feature, a[key], b[key]  # type: ignore[misc]

    def _routing(self, features: Any, weights: Any) -> AnyRouting | None:
        """The routing to run under: the one given, or the one in force; None to run the base alone."""
        if features is not None:
            return make_routing(self.flix_config.registry, features, weights)
        if not self.flix_enabled:
            return None
        routing = current.routing
        if routing is None and self.training:
            raise RoutingError(
                f"layer {self.flix_name!r} is adapted and in training, but no routing is in force; pass "
                "flix_features to the adapted model's forward (rows of base output: ids of -1)"
            )
        return routing

    def _params(
        self, active: tuple[int, ...], routing: ActiveRouting, device: torch.device
    ) -> list[Tensor]:
        """A of each active feature, then B of each, on the device."""
        keys = [self.flix_keys[i] for i in active]
        # Straight from the dictionaries: this runs for every layer and every step.
        a, b = self.flix_A._parameters, self.flix_B._parameters
        params: list[Tensor] = [*(a[k] for k in keys), *(b[k] for k in keys)]  # type: ignore[list-item]
        if routing.pager is None and params[0].device == device:
            return params
        if routing.pager is not None:
            values = routing.pager.values(self.flix_name, active)
        else:
            values = [p.detach().to(device) for p in params]  # a copy of a paged model
        return list(OnDevice.apply(values, *params)) if torch.is_grad_enabled() else values  # type: ignore[no-untyped-call]

    def _grouped(self, x: Tensor, routing: AnyRouting, trailing: int) -> tuple[Tensor, int, int]:
        """x with its leading dimensions fitted to the routing's rows; (x, rows N, positions S a row).

        Args:
            x: ``[..., d_in]`` (trailing 1), or token ids ``[...]`` (trailing 0).
            routing: the routing in force.
            trailing: the number of dimensions of x that are no positions.

        Raises:
            RoutingError: the leading dimensions are not the routing's.
        """
        lead, given = routing.lead, tuple(x.shape[: x.dim() - trailing])
        count = 1
        for size in lead:
            count *= size
        total = 1
        for size in given:
            total *= size
        fits = given[: len(lead)] == lead
        if not fits and given[:1] == (1,) and given[1 : len(lead)] == lead[1:] and lead[0] > 1:
            # One row for all, as position ids have it: each row of the batch gets its own.
            x = x.expand(lead[0], *x.shape[1:])
            total, fits = total * lead[0], True
        if not fits and len(given) == 1:
            # Models that flatten [B, S, d] to [B * S, d] before a layer.
            flattened = count if routing.per_token else lead[0] * (routing.length or -1)
            fits = given[0] == flattened
        if not fits:
            what = "[batch, length]" if routing.per_token else "[batch]"
            raise RoutingError(
                f"layer {self.flix_name!r} got an input of leading shape {list(given)}, but "
                f"flix_features routes {what} = {list(lead)}; one row of ids is needed for each row of "
                "the batch (and one for each position, where routing is per token)"
            )
        return x, count, total // count if count else 0

    def _device_plan(self, x: Tensor, routing: ActiveRouting) -> DevicePlan:
        dtype = x.dtype if x.is_floating_point() else self.weight.dtype
        return routing.plan(self.flix_layout, x.device, dtype)  # type: ignore[arg-type]

    def _check_single(self, routing: ActiveRouting, strategy: str) -> None:
        if strategy == "single" and (row := routing.unlike()) is not None:
            raise ConfigError(
                f"strategy 'single' needs one composition for all rows, but row {row} differs from "
                "row 0; use 'auto', 'gather' or 'masked'"
            )

    def _bank_tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """For traced models: rows ``[F + 2, r]`` of each feature in the whole bank, and its factors.

        The last but one stands for padding, the last for ids of no feature: their rows become NaN, never
        silently the base's, since nothing can be raised in a graph.
        """
        ranks = self.flix_layout.ranks
        widest = max(1, max(ranks, default=1))
        table = [[0] * widest for _ in range(len(ranks) + 2)]
        factor = [[0.0] * widest for _ in range(len(ranks) + 2)]
        factor[-1] = [math.nan] * widest
        start = 0
        for i, rank in enumerate(ranks):
            for j in range(rank):
                table[i][j], factor[i][j] = start + j, self.flix_layout.scales[i]
            start += rank
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        return (
            torch.tensor(table, dtype=torch.int64, device=like.device),
            torch.tensor(factor, dtype=wide, device=like.device),
        )

    def _traced_plan(self, like: Tensor, routing: TracedRouting) -> tuple[Tensor, Tensor]:
        table, factor = self._bank_tables(like)
        count = routing.flat.shape[0]
        ids = routing.flat.to(torch.int64)
        features = len(self.flix_layout.ranks)
        ids = torch.where((ids < -1) | (ids >= features), features + 1, ids)
        ids = torch.where(ids == -1, features, ids)
        scale = factor[ids]
        if routing.weights is not None:
            scale = scale * routing.weights.to(scale.dtype)[:, :, None]
        return table[ids].reshape(count, -1), scale.reshape(count, -1)


def with_grad(y: Tensor, training: bool) -> Tensor:
    """The base output of a batch that activates nothing here; in training it may still be differentiated.

    A batch whose every feature was dropped has no parameter to train; without this, its backward would be an
    error where the plain meaning is "no gradient".
    """
    if training and torch.is_grad_enabled() and not y.requires_grad and y.is_floating_point():
        return y.requires_grad_(True) if y.is_leaf else y
    return y


def flix_layers(model: nn.Module) -> Iterator[tuple[str, FlixLayer]]:
    """(path, layer) of every adapted layer, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, FlixLayer):
            yield path, module
