"""Features and their optimizer's state sharded over processes (docs/specification.md §5.2).

Under :func:`shard_features` each feature's flat parameter is a DTensor, of which every process holds an equal part, so
optimizers hold equal parts of their state. A training forward gathers the features that any process's batch activates,
all of them in one call; its backward sums their gradients over the processes in one call, and each process keeps the
mean of its own part. A feature that is active nowhere is neither gathered nor given a gradient: it keeps its bits.

Outside of training, processes run different numbers of batches and generate texts of different lengths. No forward
without gradients exchanges anything: :func:`whole_features` gathers values once, in all processes together, and what
runs under it is each process's own business. Without it such a forward is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flix.backends.torch.distributed.alike import agree, described, host_group, make_equal
from flix.backends.torch.distributed.traffic import Traffic
from flix.backends.torch.distributed.wrappers import names_of
from flix.backends.torch.parameters import Bank
from flix.backends.torch.patches import optimizers
from flix.backends.torch.patches.models import state_of
from flix.backends.torch.sharded import FlixSharded
from flix.core.adapter.sharing import chosen_features
from flix.core.errors import ConfigError, listed
from flix.core.features.names import written

# Their names from torch 2.13 on, and before.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)
_AT_ONCE = 1 << 28
"""About how many bytes of values are gathered together where all are read."""


@dataclass
class Exchanged(Traffic):
    """What one process handed to torch.distributed for sharded features.

    Attributes:
        gathered: bytes of its parts of features that were gathered.
    """

    gathered: int = 0

    @property
    def bytes(self) -> int:
        return super().bytes + self.gathered

    def add(self, other: Traffic) -> None:
        super().add(other)
        self.gathered += getattr(other, "gathered", 0)


class Sharding:
    """How a bank's features lie over processes; a bank has it as ``sharding``.

    Attributes:
        mesh: the processes: ``[shards]``, or ``[replicas, shards]``.
        parts: how many processes share a feature.
        part: this process's number among them.
        kept: whole values by feature id, inside :func:`whole_features`.
        last: what the last training forward and its backward have exchanged.
        total: what was exchanged before, with what files and evaluation gathered.
        told: bytes by which this process has told others which features a coming forward activates.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.parts, self.part = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
        self.kept: dict[int, Tensor] | None = None
        self.last, self.total, self.told = Exchanged(), Exchanged(), 0
        self._steps = 0

    def __deepcopy__(self, _: Any) -> Sharding:
        return Sharding(self.mesh)  # groups of processes are no model's own

    def check(self, optimizer: torch.optim.Optimizer, bank: Bank) -> None:
        """Refuse an optimizer that has a parameter twice, and so lacks another.

        Raises:
            ConfigError: it has.
        """
        own = {id(p): i for i, p in bank.held().items()}
        found = [own[id(p)] for g in optimizer.param_groups for p in g["params"] if id(p) in own]
        if len(found) != len({*found}):
            name = written(bank.features[max(found, key=found.count)])
            raise ConfigError(
                f"the optimizer has the parameter of {name} more than once, and may lack others: Accelerator.prepare looks "
                "for parameters by address, and features of which this process holds no part have none. Set "
                'optimizer.param_groups[i]["params"] after prepare, or let FlixTrainer do it'
            )

    def shard(self, value: Tensor, trains: bool = True) -> nn.Parameter:
        """A feature's parameter, of its whole vector, which every process has."""
        chunk = -(-len(value) // self.parts)
        start = min(self.part * chunk, len(value))
        own = value[start : start + chunk].clone()  # a view would keep the whole in memory
        return nn.Parameter(self._spread(own, len(value)), requires_grad=trains)

    def _spread(self, own: Tensor, length: int) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [Replicate()] * (self.mesh.ndim - 1) + [Shard(0)]
        shape = torch.Size((length,))
        return DTensor.from_local(own, self.mesh, placements, run_check=False, shape=shape, stride=(1,))  # fmt: skip

    def in_force(self, bank: Bank, held: Mapping[int, Any], grad: bool) -> dict[int, Tensor]:
        """The whole vectors of a forward's features, by id.

        Raises:
            ConfigError: a forward without gradients outside :func:`whole_features`, or one with gradients under it.
        """
        if self.kept is not None:
            return self._kept(bank, held, grad)
        if not grad:
            raise ConfigError(
                "the features are sharded, and a forward without gradients exchanges nothing, "
                "because other processes may run "
                "more batches or longer texts: evaluate and generate under `with whole_features(model):`, which all "
                "processes enter"
            )
        self.total.add(self.last)
        self.last = Exchanged(len(held), len(bank.held()), bool(self.told), self.told, steps=1)
        self.told = 0
        whole = Gather.apply(self, *held.values())  # type: ignore[no-untyped-call]
        return dict(zip(held, whole, strict=True))

    def _kept(self, bank: Bank, held: Mapping[int, Any], grad: bool) -> dict[int, Tensor]:
        assert self.kept is not None
        if grad and any(p.requires_grad for p in held.values()):
            raise ConfigError(
                "whole_features holds copies, through which no gradient reaches the features: run the forward under "
                "torch.no_grad(), or leave whole_features to train"
            )
        if self._steps != optimizers.steps:
            raise ConfigError(
                "an optimizer has stepped since whole_features was entered, and its copies may "
                "be out of date; leave it before you go on training"
            )
        if missing := [written(bank.features[i]) for i in held if i not in self.kept]:
            raise ConfigError(
                f"whole_features was entered for some features only, but the batch also has "
                f"{listed(missing, 5)}; name these too, or leave out features="
            )
        return {i: self.kept[i] for i in held}

    def gathered(self, parameters: Sequence[Tensor], count: Exchanged) -> list[Tensor]:
        """The whole vectors of some parameters: one call for each dtype among them."""
        found: dict[int, Tensor] = {}
        for places in _by_dtype(parameters):
            some = [parameters[i] for i in places]
            lengths = [len(p) for p in some]
            chunks = [-(-n // self.parts) for n in lengths]
            own = [_padded(p.to_local(), c) for p, c in zip(some, chunks, strict=True)]  # type: ignore[attr-defined]
            sent = torch.cat(own)
            got = sent.new_empty(self.parts * len(sent))
            _ALL_GATHER(got, sent, group=self._group())
            count.calls += 1
            count.gathered += sent.nbytes
            columns = got.view(self.parts, -1).split_with_sizes(chunks, 1)
            for i, piece, n in zip(places, columns, lengths, strict=True):
                found[i] = piece.reshape(-1)[:n]
        return [found[i] for i in range(len(parameters))]

    def scattered(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The mean of some whole gradients over all processes, sharded: one call for each dtype among them."""
        found: dict[int, Tensor] = {}
        for places in _by_dtype(grads):
            some = [grads[i] for i in places]
            chunks = [-(-len(g) // self.parts) for g in some]
            rows = [
                _padded(g, c * self.parts).view(self.parts, c)
                for g, c in zip(some, chunks, strict=True)
            ]
            sent = torch.cat(rows, 1)
            got = sent.new_empty(sent.shape[1])
            _REDUCE_SCATTER(got, sent.view(-1), group=self._group())
            self.last.calls += 1
            self.last.sent += sent.nbytes
            if self.mesh.ndim > 1:
                dist.all_reduce(got, group=self.mesh.get_group(0))
                self.last.calls += 1
                self.last.sent += got.nbytes
            got /= self.mesh.size()
            for i, own, g, c in zip(
                places, got.split_with_sizes(chunks), some, chunks, strict=True
            ):
                left = min(max(len(g) - self.part * c, 0), c)
                found[i] = self._spread(own[:left], len(g))
        return [found[i] for i in range(len(grads))]

    def values(self, bank: Bank, ids: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """The whole vectors of some features by id, some at a time; all processes ask for the same."""
        held = [(i, p.detach()) for i in ids if (p := bank.parameter(i)) is not None]
        starts = itertools.accumulate((p.numel() * p.element_size() for _, p in held), initial=0)
        groups = itertools.groupby(
            zip(held, starts, strict=False), lambda entry: entry[1] // _AT_ONCE
        )
        for _, group in groups:
            some = [entry for entry, _ in group]
            yield from zip(
                [i for i, _ in some], self.gathered([p for _, p in some], self.total), strict=True
            )

    @contextmanager
    def keeping(self, bank: Bank, ids: Collection[int]) -> Iterator[None]:
        """Hold whole values of some features."""
        if self.kept is not None:
            raise ConfigError("whole_features is entered already, and cannot be nested")
        with torch.no_grad():
            self.kept = dict(self.values(bank, ids))
        self._steps = optimizers.steps
        try:
            yield
        finally:
            self.kept = None

    def _group(self) -> Any:
        return self.mesh.get_group(self.mesh.ndim - 1)


class Gather(torch.autograd.Function):
    """From sharded parameters to whole vectors; their gradients are summed over the processes on the way back."""

    @staticmethod
    def forward(ctx: Any, sharding: Sharding, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.sharding = sharding
        return tuple(sharding.gathered(parameters, sharding.last))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        places = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        found: list[Tensor | None] = [None] * len(grads)
        with torch.no_grad():
            for i, grad in zip(places, ctx.sharding.scattered([grads[i] for i in places]), strict=True):  # fmt: skip
                found[i] = grad
        return (None, *found)


def _by_dtype(values: Sequence[Tensor]) -> list[list[int]]:
    kinds: dict[torch.dtype, list[int]] = {}
    for i, value in enumerate(values):
        kinds.setdefault(value.dtype, []).append(i)
    return [kinds[kind] for kind in sorted(kinds, key=str)]


def _padded(value: Tensor, length: int) -> Tensor:
    return value if len(value) == length else F.pad(value, (0, length - len(value)))


def shard_features(model: nn.Module, mesh: Any) -> None:
    """Shard an adapted model's features over processes; give the optimizer its parameters after this call::

        mesh = init_device_mesh("cuda", (dist.get_world_size(),))
        shard_features(model, mesh)
        features = set(model.flix_bank.parameters())
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=features)
        optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-3)

    The base is sharded too, as in this example, or stays whole in every process. Each process holds an equal part of
    every feature's values, gradient and optimizer state; a training step exchanges the features that are active in
    it. Use ``whole_features`` for evaluation and generation. From now on, every process must call functions that read
    or change features with the same arguments: ``save`` (the first process writes), ``load``, ``merge``,
    ``export_peft``, ``add_feature``, ``freeze`` and so on.

    The processes first agree on what they train, and get the first one's values, as in ``reduce_features``.

    Args:
        model: an adapted model.
        mesh: a ``DeviceMesh`` over all processes: ``[shards]``; or ``[replicas, shards]``, as for ``fully_shard``.

    Raises:
        TargetError: the model is not adapted.
        ConfigError: features that are already sharded, reduced or paged, or that are on other devices than the mesh;
            a mesh without some of the processes; layers that are spread over processes (``tp_plan``); processes that
            differ.
    """
    state = state_of("shard_features", model)
    bank = state.bank
    _check_mesh(mesh)
    if state.pager is not None:
        raise ConfigError("paged features are not sharded; unpage(model) first, or page without shard_features")  # fmt: skip
    if state.reducer is not None:
        raise ConfigError(
            "reduce_features averages gradients that shard_features sums as it scatters them; use one of the two"
        )
    if spread := [m.flix_name for m in model.modules() if isinstance(m, FlixSharded)]:
        raise ConfigError(
            f"layer {spread[0]!r} is spread over processes by tp_plan, whose processes share one batch; shard_features is "
            "for processes with batches of their own"
        )
    for i, parameter in bank.held().items():
        name = written(bank.features[i])
        if hasattr(parameter, "device_mesh"):
            raise ConfigError(
                f"the parameter of {name} is sharded already; call shard_features once, and before fully_shard(model, "
                "ignored_params=set(model.flix_bank.parameters()))"
            )
        if parameter.device.type != mesh.device_type:
            raise ConfigError(
                f"the parameter of {name} is on {parameter.device}, but the mesh is of {mesh.device_type!r}; move the "
                "model there first, or make a mesh of its device"
            )
    host = host_group(None)
    agree(described(model, state), host)
    values = {id(t): t for t in (*model.parameters(), *model.buffers())}
    make_equal(list(values.values()), None, host)
    sharding = Sharding(mesh)
    for i, parameter in bank.held().items():
        bank.hold(bank.features[i], sharding.shard(parameter.detach(), parameter.requires_grad))
    bank.sharding = sharding
    state.forget()
    # DDP around the model then leaves the features alone.
    known = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    vars(model)["_ddp_params_and_buffers_to_ignore"] = [*known, *names_of(model, state)]


@contextmanager
def whole_features(model: nn.Module, features: Any = None) -> Iterator[None]:
    """Gather sharded features once, so that this process can evaluate and generate by itself::

        with whole_features(model), torch.no_grad():
            for batch in its_own_batches:
                model(**batch)

    All processes enter it together. Inside, each runs what it wants, and they need not run the same amount. If the
    base is under FSDP2, its forwards still exchange the base's kernels. Without ``shard_features`` it does nothing.

    Args:
        model: an adapted model.
        features: gather only these, ``[(group, name), ...]`` or ``{group: name or names}``; default: all.

    Raises:
        TargetError: the model is not adapted.
        FeatureError: an unknown feature.
        ConfigError: it is already entered; or, inside it, a forward needs gradients of features or a feature that was
            left out, or an optimizer has stepped.
    """
    state = state_of("whole_features", model)
    registry = state.config.registry
    chosen = registry.live if features is None else chosen_features(registry, features)
    if state.bank.sharding is None:
        yield
        return
    state.last = None
    try:
        with state.bank.sharding.keeping(state.bank, sorted(registry.id(*f) for f in chosen)):
            yield
    finally:
        state.last = None


def _check_mesh(mesh: Any) -> None:
    """Refuse what is no mesh of all processes."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise ConfigError(
            f"shard_features needs a DeviceMesh, got {type(mesh).__name__}; make one with "
            'init_device_mesh("cuda", (dist.get_world_size(),))'
        )
    world = dist.get_world_size()
    if mesh.ndim > 2 or mesh.size() != world:
        shape = tuple(mesh.shape)
        raise ConfigError(
            f"shard_features needs a mesh of all {world} processes, [shards] or [replicas, shards], got one of the shape "
            f"{shape}: gradients would be summed over some of the processes only"
        )


__all__ = ["Exchanged", "Sharding", "shard_features", "whole_features"]
