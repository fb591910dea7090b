"""One tenant of several that train side by side: its optimizer, its schedule and its step (docs/tenants.md)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flix.backends.torch.by_feature import scale_to
from flix.backends.torch.parameters import Bank
from flix.core.checks import whole
from flix.core.errors import ConfigError, TargetError, shown
from flix.core.features.names import Feature, written
from flix.core.features.owners import positive

Pieces = list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]
"""Views of a parameter, and what takes the same views of its gradient."""


@dataclass(eq=False)
class Tenant:
    """One tenant's training.

    Attributes:
        feature: its feature, (group, name).
        parameter: the feature's parameter.
        optimizer: its own optimizer.
        schedule: its own learning-rate schedule, or None.
        limit: how many steps it takes in all, or None.
        max_norm: what its gradient's norm is clipped to, or None.
        taken: how many steps it has taken.
        stopped: whether it trains no more.
        norm: its gradient's norm at its last step, before clipping; None without ``max_norm``.
    """

    feature: Feature
    parameter: nn.Parameter
    optimizer: torch.optim.Optimizer
    schedule: Any
    limit: int | None
    max_norm: float | None
    pieces: list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]
    taken: int = 0
    stopped: bool = False
    norm: Tensor | None = None

    def step(self) -> None:
        """One step with the gradient that is there."""
        grad = self.parameter.grad
        assert grad is not None
        if self.max_norm is not None:
            self.norm = torch.linalg.vector_norm(grad)
            scale_to(grad, self.norm, self.max_norm)
        for piece, of in self.pieces:
            piece.grad = of(grad)
        self.optimizer.step()
        for piece, _ in self.pieces:
            piece.grad = None
        if self.schedule is not None:
            self.schedule.step()
        self.taken += 1


def make_tenant(bank: Bank, feature: Feature, settings: dict[str, Any], matrices: bool) -> Tenant:
    """A tenant as it begins; its feature trains from now on.

    Args:
        bank: the features' parameters.
        feature: its feature.
        settings: its own ``optimizer``, ``lr``, ``schedule``, ``steps`` and ``max_norm``.
        matrices: whether the optimizer gets each layer's A and B.

    Raises:
        ConfigError: a setting out of its range, or an optimizer or schedule that cannot serve.
    """
    name, parameter = feature[1], bank.parameter(feature)
    if parameter is None:
        raise ConfigError(f"{written(feature)} has rank 0 in every layer: nothing of it trains")
    make, lr, schedule, steps, max_norm = settings.values()
    steps = None if steps is None else whole(steps, f"steps of {name!r}", 1)
    max_norm = None if max_norm is None else positive(max_norm, f"max_norm of {name!r}")
    pieces = _pieces(bank, feature, parameter) if matrices else []
    given = [piece for piece, _ in pieces] or [parameter]
    before = parameter.requires_grad
    parameter.requires_grad_(True)  # some optimizers look
    try:
        made = make(given) if lr is None else make(given, lr=lr)
        _check_optimizer(made, name, given)
        planned = None if schedule is None else schedule(made)
        _check_schedule(planned, name, made)
    except BaseException:
        parameter.requires_grad_(before)
        raise
    return Tenant(feature, parameter, made, planned, steps, max_norm, pieces)


def _pieces(
    bank: Bank, feature: Feature, parameter: nn.Parameter
) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
    """A feature's A and B of each layer as parameters of their own, and what makes their gradients of the vector's."""
    made: list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]] = []
    i = bank.ids[feature]

    def piece(start: int, end: int, shape: tuple[int, ...], turned: bool) -> None:
        def of(vector: Tensor) -> Tensor:
            view = vector[start:end].view(shape)
            return view.transpose(-1, -2) if turned else view

        made.append((nn.Parameter(of(parameter.detach())), of))

    for place, shape in enumerate(bank.layout.shapes):
        if rank := bank.layout.rank(i, place):
            start, middle, end = bank.layout.starts[i][2 * place : 2 * place + 3]
            piece(start, middle, (*shape.lead, rank, shape.d_in), False)
            piece(middle, end, (*shape.lead, rank, shape.d_out), True)
    return made


def _needed(step: Any) -> list[str]:
    """The arguments that a step needs."""
    try:
        found = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return []
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in found if p.kind in plain and p.default is p.empty]


def _check_optimizer(made: Any, name: str, given: Sequence[nn.Parameter]) -> None:
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer must make a torch.optim.Optimizer, got {shown(made)} for {name!r}"
        )
    kind = type(made).__name__
    held = [id(p) for group in made.param_groups for p in group["params"]]
    if sorted(held) != sorted(map(id, given)):
        raise ConfigError(
            f"the {kind} of {name!r} holds other parameters than it was given; each tenant needs one of its own"
        )
    if isinstance(made, torch.optim.LBFGS | torch.optim.SparseAdam) or _needed(made.step):
        raise ConfigError(
            f"{kind} cannot train tenants: it needs a closure (or arguments, or sparse gradients) at each step, which "
            "one mixed batch cannot give; use one whose step() takes the gradients as they are"
        )


def _check_schedule(made: Any, name: str, optimizer: Any) -> None:
    if made is None:
        return
    if getattr(made, "optimizer", optimizer) is not optimizer:
        raise ConfigError(
            f"the schedule of {name!r} is of another optimizer; schedule is called with each tenant's own"
        )
    if not callable(getattr(made, "step", None)) or _needed(made.step):
        raise ConfigError(
            f"{type(made).__name__} of {name!r} cannot be a tenant's schedule: its step() needs "
            f"arguments. Leave it out, and step one that you make of tenants[{name!r}].optimizer "
            f"yourself"
        )


def batch_norms(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that may normalise over the batch, by path."""
    kind = nn.modules.batchnorm._BatchNorm
    return [(path, module) for path, module in model.named_modules() if isinstance(module, kind)]


def refuse_batch_norms(found: Sequence[tuple[str, Any]]) -> None:
    """Refuse those that do, now.

    Raises:
        ConfigError: naming the first.
    """
    for path, module in found:
        if module.training or module.running_mean is None:
            raise ConfigError(
                f"the layer {path!r} normalises over the batch, and so would couple tenants; "
                "put it in evaluation: module.eval()"
            )


def refuse_changed(name: str, tenant: Tenant, bank: Bank) -> None:
    """Refuse a tenant whose parameter was changed behind its back.

    Raises:
        ConfigError: it was renamed, removed, replaced, frozen or moved.
    """
    if bank.parameter(tenant.feature) is not tenant.parameter:
        raise ConfigError(
            f"the tenant {name!r} has changed: its feature was renamed, removed or replaced. Use "
            f"rename, leave and resume of Tenants, or make new Tenants"
        )
    if not tenant.stopped and not tenant.parameter.requires_grad:
        raise ConfigError(
            f"the tenant {name!r} was frozen from outside (add_feature does so unless freeze_others=False): "
            f"stop({name!r}), or thaw(model, ...) its feature"
        )
    where = tenant.parameter.untyped_storage().data_ptr()
    if any(p.untyped_storage().data_ptr() != where for p, _ in tenant.pieces[:1]):
        raise ConfigError(
            f"the values of the tenant {name!r} have moved to another device or dtype, without "
            f"its optimizer; make Tenants when the model is where it will stay"
        )


def refuse_processes() -> None:
    """Refuse to be one of several processes.

    Raises:
        TargetError: it is.
    """
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise TargetError(
            f"Tenants train in one process, and this is one of {dist.get_world_size()}: which tenants took part would "
            "differ between them. Give each process tenants of its own, without a process group"
        )
