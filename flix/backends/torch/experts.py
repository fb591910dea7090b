"""Modules that hold experts' kernels in tensors with an axis of experts, adapted (docs/specification.md §1.4).

transformers 5 has one form for them: classes that ``use_experts_implementation`` decorates, whose forward several
implementations may compute, of nothing but their attributes. So do we: tokens are sorted by the expert that they are
sent to, and go through :mod:`flix.backends.torch.experts_sums`. Each kernel is a layer by itself, by the path of its
parameter: ``model.layers.0.mlp.experts.down_proj``.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flix.backends import messages
from flix.backends.torch.experts_entries import Entries, Sent, row_order
from flix.backends.torch.experts_sums import RoutedExperts
from flix.backends.torch.grouped import Groups
from flix.backends.torch.kernels.experts import routed_experts
from flix.backends.torch.layer import KERNELS, Adapted, with_grad
from flix.backends.torch.patches.hooked import rebind, runs_own
from flix.backends.torch.routing import ActiveRouting, AnyRouting, TracedRouting
from flix.backends.torch.rows import rows_of
from flix.backends.torch.state import FlixState
from flix.core.adapter.adapter import LayerShape
from flix.core.errors import ConfigError, TargetError

_LIBRARY = "transformers.integrations.moe"
_NAMES = ("gate_up_proj", "up_proj", "down_proj")
_TOLD = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "top_k")
_KEPT = "_flix_experts"  # the class's own attribute that holds its adapted class


def experts_of(module: nn.Module) -> tuple[dict[str, LayerShape], str]:
    """The kernels of a module of experts by parameter, adapted or not, or none of them and the reason.

    The reason is empty for modules of other kinds.
    """
    cls = getattr(module, "flix_base", None) if isinstance(module, FlixExperts) else type(module)
    forward: Any = getattr(cls, "forward", None)
    told = getattr(getattr(forward, "__globals__", None), "get", lambda _: None)("__name__")
    if told != _LIBRARY or not hasattr(forward, "__wrapped__"):
        return {}, ""
    held: dict[str, Any] = {n: module._parameters.get(n) for n in _NAMES if n in module._parameters}
    if any(p is None or p.dim() != 3 for p in held.values()) or "down_proj" not in held:
        return {}, f"{cls.__name__} keeps its kernels under other names, or in other forms"  # type: ignore[union-attr]
    if any(not p.is_floating_point() for p in held.values()):
        return {}, "its kernels are quantised"
    if not runs_own(module):
        return {}, "its forward is patched on the instance"
    settings: Any = getattr(module, "config", None)
    active = next((n for name in _TOLD if type(n := getattr(settings, name, None)) is int), 1)
    return {
        name: _shape(p, module.is_transposed, active)  # type: ignore[arg-type]
        for name, p in held.items()
    }, ""


def _shape(kernel: Tensor, transposed: bool, active: int) -> LayerShape:
    experts, *sizes = kernel.shape
    d_in, d_out = sizes if transposed else sizes[::-1]
    return LayerShape(d_in, d_out, "linear", experts, active)


def site(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a layer's kernel, and under which name: ``weight``, or that of experts' kernels."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    return (module._modules[name], "weight") if name in module._modules else (module, name)  # type: ignore[return-value]


class ExpertsKernel(Adapted):
    """A kernel of a module of experts, ``[E, d_out, d_in]`` or its transpose, with the features' pairs for it.

    Args:
        module: the module.
        parameter: the kernel's name in it.
    """

    def __init__(
        self, module: FlixExperts, parameter: str, name: str, place: int, state: FlixState
    ) -> None:
        self.module, self.parameter = module, parameter
        self.flix_name, self.flix_place, self.flix_state = name, place, state

    @classmethod
    def shape_of(cls, layer: Any) -> LayerShape:
        return experts_of(layer.module)[0][layer.parameter]

    @property
    def flix_transposed(self) -> bool:  # type: ignore[override]
        return bool(self.module.is_transposed)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return getattr(self.module, self.parameter)  # type: ignore[no-any-return]

    @weight.setter
    def weight(self, value: Tensor) -> None:
        setattr(self.module, self.parameter, value)

    @property
    def straight(self) -> Tensor:
        """The kernel as ``[E, d_in, d_out]``."""
        return self.weight if self.flix_transposed else self.weight.transpose(1, 2)


class FlixExperts(nn.Module):
    """What adapted modules of experts have over their own class.

    Attributes:
        flix_kernels: the adapted kernels, by parameter.
        flix_base: the class of the plain module.
    """

    flix_kernels: dict[str, ExpertsKernel]
    flix_base: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The experts' weighted sum for each token, each under its own row's features.

        Args:
            args, kwargs: as the plain module takes them: tokens ``[tokens, d]``, the experts that each is sent to
                ``[tokens, k]``, and their weights in that shape.

        Raises:
            RoutingError: no routing, or tokens of which it is not known whose rows they are.
            ConfigError: ``"single"`` for rows that differ; torch.func; experts spread over devices.
        """
        first = next(iter(self.flix_kernels.values()))
        routing = first._routing(None, None)
        if routing is None:
            return self.flix_base.forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        tokens, index, weights = self._given(args, kwargs)
        _check(self, first, routing)
        x, _, length, routing = rows_of(first, tokens, routing, trailing=1)
        if routing.watch is not None:
            routing.watch.called.update(kernel.flix_place for kernel in self.flix_kernels.values())
        if x.shape[0] != tokens.shape[0]:  # one token for all rows
            raise messages.other_lead(first.flix_name, [tokens.shape[0]], list(routing.lead), True)
        if tokens.shape[0] == 0:
            return with_grad(self.flix_base.forward(self, *args, **kwargs), self.training)
        return self._sum(tokens, index, weights, length, routing)

    @classmethod
    def _names(cls) -> list[str]:
        return list(inspect.signature(cls.flix_base.forward).parameters)[1:4]

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Tokens, indices and weights, by place or by the names that the class gives them."""
        names = self._names()
        return [*args, *(kwargs[name] for name in names[len(args) :])]

    def _sum(
        self, tokens: Tensor, index: Tensor, weights: Tensor, length: int, routing: AnyRouting
    ) -> Tensor:
        each = index.shape[-1]
        by_row = None if isinstance(routing, TracedRouting) else row_order(routing.flat)
        of, order = _sorted(index, length, by_row)
        token = order // each
        sent = Sent(Groups(of, self._count()), token, token // length)
        entries = self._entries(routing, sent, by_row)
        up = "gate_up_proj" if self.has_gate else "up_proj"
        y = self._product(up, tokens, sent, True, routing, entries)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)  # type: ignore[operator]
        y = self._product("down_proj", y, sent, False, routing, entries)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)  # type: ignore[operator]
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        placed = torch.zeros_like(y).index_copy(0, order, y)
        y = placed.view(tokens.shape[0], each, -1).sum(1).to(tokens.dtype)
        first = next(iter(self.flix_kernels.values()))
        return y if isinstance(routing, TracedRouting) else first._open(y, self.training)

    def _count(self) -> int:
        return int(self.down_proj.shape[0])  # type: ignore[union-attr, index]

    def _entries(self, routing: AnyRouting, sent: Sent, by_row: Any) -> Entries | None:
        """Which entries each feature acts on; a compiled graph finds them when it runs."""
        if isinstance(routing, TracedRouting):
            return None
        kernels = self.flix_kernels.values()
        wanted = {i for k in kernels for i, rank in enumerate(k.flix_layout.ranks) if rank}
        return Entries(routing.flat, wanted, sent, by_row)

    def _product(
        self,
        name: str,
        x: Tensor,
        sent: Sent,
        gathers: bool,
        routing: AnyRouting,
        entries: Entries | None,
    ) -> Tensor:
        """One kernel's ``[S, d_out]``, in the kernel's dtype: grouped products are none of autocast's."""
        kernel: Tensor = getattr(self, name)
        straight = kernel if self.is_transposed else kernel.transpose(1, 2)
        adapted, x = self.flix_kernels.get(name), x.to(kernel.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(routing, TracedRouting):
                y = _traced(x, straight, sent, gathers, routing, adapted)
            else:
                assert entries is not None
                y = _eager(x, straight, sent, gathers, routing, entries, adapted)
        if self.has_bias:
            y = y + getattr(self, f"{name}_bias")[sent.experts.of]
        return y

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; copies and pickles name the module's own class instead.
        made = super().__reduce_ex__(protocol)
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            made = (_new, (self.flix_base, *made[1][1:]), *made[2:])
        return made


def _sorted(index: Tensor, length: int, by_row: Any) -> tuple[Tensor, Tensor]:
    """The entries' experts ``[S]``, ascending, and where each stood; in an expert, row after row in this order."""
    flat = index.reshape(-1)
    count = 0 if by_row is None else len(by_row)
    if count == 0 or bool((by_row[:-1] < by_row[1:]).all()):
        return flat.sort(stable=True)  # type: ignore[return-value]
    place = torch.from_numpy(by_row.argsort()).to(flat.device)
    entries = place.repeat_interleave(len(flat) // count)
    keys, order = (flat * count + entries).sort(stable=True)
    return keys // count, order


def _check(module: Any, first: ExpertsKernel, routing: AnyRouting) -> None:
    """Refuse what this cannot compute."""
    if getattr(module, "_is_expert_parallel", False):  # not there before transformers 5.24
        raise ConfigError(
            f"the experts of {first.flix_name!r} are spread over devices (expert parallelism), where a token's row is not "
            "known; load the model without it, or leave the experts out (exclude_modules)"
        )
    if isinstance(routing, TracedRouting) and not torch.compiler.is_compiling():
        raise ConfigError(
            f"torch.func's transforms do not run through the experts of {first.flix_name!r}; leave them out "
            "(exclude_modules), or take gradients with autograd"
        )
    if module.training and (rate := first.flix_state.config.lora_dropout):
        raise messages.undropped(rate, [k.flix_name for k in module.flix_kernels.values()])
    if isinstance(routing, ActiveRouting) and first.flix_state.strategy == "single":
        first._check_single(routing, "single")


def _eager(
    x: Tensor,
    kernel: Tensor,
    sent: Sent,
    gathers: bool,
    routing: ActiveRouting,
    entries: Entries,
    adapted: ExpertsKernel | None,
) -> Tensor:
    layout = None if adapted is None else adapted.flix_layout
    active = [] if layout is None else [i for i in routing.features() if layout.ranks[i]]
    if adapted is None or layout is None or not active:
        return RoutedExperts.apply(x, kernel, None, None, sent, gathers, [], ([], []))  # type: ignore[no-any-return, no-untyped-call]
    found = routing.in_force(adapted.flix_state)
    values = found.values(active, adapted.flix_place, x.device)
    factors = None
    if routing.weights is not None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        weights = routing.weights.reshape(routing.flat.shape).to(x.device, wide)
        factors = entries.factors(weights)
    shares = entries.shares(active, layout.ranks, layout.scales, factors is not None)
    carrier = found.carrier(adapted.flix_place)
    return RoutedExperts.apply(x, kernel, factors, carrier, sent, gathers, shares, values)  # type: ignore[no-any-return, no-untyped-call]


def _traced(
    x: Tensor,
    kernel: Tensor,
    sent: Sent,
    gathers: bool,
    routing: TracedRouting,
    adapted: ExpertsKernel | None,
) -> Tensor:
    """The same inside a compiled graph, where ids are known to the running graph alone."""
    ranks, scales, a, b = [0], [0.0], [], []
    if adapted is not None:
        layout, side = adapted.flix_layout, 2 * adapted.flix_place
        ranks, scales = list(layout.ranks), list(layout.scales)
        held = [routing.parts[i] for i, rank in enumerate(ranks) if rank]
        a, b = [parts[side] for parts in held], [parts[side + 1] for parts in held]
    ids = routing.flat.to(x.device)
    weights = None if routing.weights is None else routing.weights.to(x.device)
    return routed_experts(  # type: ignore[no-any-return]
        x, kernel, weights, a, b, sent.experts.of, sent.token, sent.row, ids, gathers, ranks, scales
    )


def _new(base: type[nn.Module], *args: Any) -> Any:
    cls = experts_class(base)
    return cls.__new__(cls, *args)


def experts_class(base: type[nn.Module]) -> type[FlixExperts]:
    """The adapted class of a class of experts; a class keeps it."""
    if _KEPT not in vars(base):
        members = {
            "flix_base": base,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        setattr(base, _KEPT, type(base.__name__, (FlixExperts, base), members))
    return vars(base)[_KEPT]  # type: ignore[no-any-return]


def become_kernel(
    module: nn.Module, parameter: str, name: str, place: int, state: FlixState
) -> ExpertsKernel:
    """Adapt one kernel of a module of experts, in place.

    Raises:
        TargetError: it cannot be adapted.
    """
    kernels, reason = experts_of(module)
    if parameter not in kernels:
        raise TargetError(
            f"layer {name!r} cannot be adapted: {reason or 'it is not a kernel of experts'}"
        )
    if not isinstance(module, FlixExperts):
        base, module.__class__ = type(module), experts_class(type(module))
        vars(module)[KERNELS] = {}
        rebind(module, base)
    held = vars(module)[KERNELS]
    held[parameter] = kernel = ExpertsKernel(module, parameter, name, place, state)  # type: ignore[arg-type]
    ordered = {n: held[n] for n in module._parameters if n in held}  # as PEFT nests them
    held.clear()
    held.update(ordered)
    return kernel


def revert_kernel(kernel: ExpertsKernel) -> None:
    """Turn a module of experts back into the plain module it was, in place, one kernel after the other."""
    module = kernel.module
    if "flix_kernel" in vars(kernel):  # merged in place: the base's own kernel comes back
        kernel.weight = vars(kernel)["flix_kernel"]
    held = vars(module)[KERNELS]
    held.pop(kernel.parameter)
    if not held:
        adapted, base = type(module), module.flix_base
        del vars(module)[KERNELS]
        module.__class__ = base  # type: ignore[assignment]
        rebind(module, adapted)
