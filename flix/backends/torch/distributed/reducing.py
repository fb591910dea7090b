"""Gradients averaged over processes for the features that acted in any of them (docs/specification.md §5.2.5).

DDP reduces every parameter that it wraps, whether a step used it or not. A reducer sends, at the end of a backward, one
small message that says which features have a gradient in which process, and then one tensor (for each dtype and device)
with the gradients of those that have one anywhere. To average gradients that are averages already changes nothing, so a
backward more, accumulation, or a call by hand cannot count anything twice.

The end of a backward is found from the model's outputs, whose gradient every process's backward computes, whatever its
batch activates: hooks on them wait for the end of the autograd engine's run that they belong to, and so for what
reentrant checkpoints do inside of it. Compiled forwards, and losses that leave the outputs out, are found from the
parameters. What neither finds is reduced before the optimizer's step. Each message also says what the process has done
so far and what it trains: processes that differ raise, all of them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from flix.backends.torch.distributed.alike import (
    agree,
    described,
    device_for,
    host_group,
    make_equal,
)
from flix.backends.torch.distributed.traffic import Traffic
from flix.backends.torch.distributed.wrappers import active_ddp, names_of, sharded
from flix.backends.torch.heads import base_parameters
from flix.backends.torch.patches.models import state_of
from flix.backends.torch.routing import tracing
from flix.backends.torch.state import FlixState
from flix.core.config.agreeing import digest
from flix.core.errors import ConfigError, listed
from flix.core.features.names import written

_NUMBERS = 16
"""Bytes in front of a message: what was done so far, and what is trained; then the same, each byte from 255."""

_ROUND = 1024
"""Messages are so many bytes, or a multiple: processes that have a feature more or less can still tell each other."""


def reduce_features(model: nn.Module, group: Any = None, *, automatic: bool = True) -> Reducer:
    """Average the gradients of the features in use over processes, with DDP or instead of it.

    Call it in every process, when the model is on its device, and before DDP wraps it (if you use DDP). The processes
    agree on what they train, and get the first one's values. From then on the gradients of the features that acted in
    any process are averaged at the end of each backward, before clipping, in one call. A feature that acted in only
    one process trains in the same way in all; a feature that acted in none gets no gradient and keeps its bits in
    all.

    Trained heads are averaged too. If DDP wraps the model, DDP does that and leaves the features alone. Buffers, such
    as running statistics, become equal at the start; later, only DDP keeps them equal.

    Args:
        model: an adapted model.
        group: a process group of torch.distributed; default: all processes.
        automatic: reduce at the end of each backward. If False, reduce where :meth:`Reducer.reduce` is called, or
            else before the optimizer's step.

    Returns:
        The reducer. It says what was sent, and has ``reduce()`` and ``no_sync()``. It is also
        ``model.flix_state.reducer``. Copies of the model have none.

    Raises:
        TargetError: the model is not adapted.
        ConfigError: there is no process group; the features are sharded, or DDP has wrapped them; the processes train
            different things (raised in every process, with the differences named).

    Example::

        torch.distributed.init_process_group()                  # torchrun --nproc-per-node 2 train.py
        reducer = reduce_features(model)
        model(**batch, flix_features=ids).loss.backward()        # gradients are averages now
        torch.nn.utils.clip_grad_norm_(trainable_parameters(model), 1.0)
        optimizer.step()
        print(reducer.last)                                      # reduced 20 of 1,000 features: ... bytes in 2 calls
    """
    state = state_of("reduce_features", model)
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "reduce_features needs a process group: start the processes with torchrun (or accelerate launch), and call "
            "torch.distributed.init_process_group() first"
        )
    for i, parameter in state.bank.held().items():
        if sharded(parameter):
            raise ConfigError(
                f"the parameter of {written(state.bank.features[i])} is sharded, and its gradients are reduced where they are "
                "scattered; use reduce_features or a sharded model, not both"
            )
    if state.reducer is not None:
        state.reducer.stop()
    made = Reducer(model, state, group, automatic)
    state.reducer = made
    return made


class Reducer:
    """Averages an adapted model's gradients; made by :func:`reduce_features`.

    Attributes:
        last: what the last reduction sent.
        total: what all of them sent.
        start: bytes that the processes sent at the start, to agree on what they train.
    """

    def __init__(self, model: nn.Module, state: FlixState, group: Any, automatic: bool) -> None:
        self.model: Any = model
        self.state: FlixState = state
        self.automatic: bool = automatic
        self.group: Any = group
        self.size: int = dist.get_world_size(group)
        self.host: Any = host_group(group)
        self.last: Traffic = Traffic()
        self.total: Traffic = Traffic()
        self._quiet = 0  # how many no_sync are open
        self._silent = False  # whether the last forward ran in one
        self._wrapped = False  # whether DDP ran it
        self._pending: int | None = None  # the engine's run at whose end gradients are reduced
        self._steps = self._count = 0
        self._seen: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._hooks: dict[int, Any] = {}
        self.follow()
        self.start: int = agree(described(model, state), self.host)
        values = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.start += make_equal(list(values.values()), group, self.host)
        model._ddp_params_and_buffers_to_ignore = self._leave_out(model)  # type: ignore[assignment]

    def _leave_out(self, model: nn.Module) -> list[str]:
        """Names that DDP shall pass over, those that a compiled model's wrapper would give them, too."""
        known = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ())]
        own = names_of(model, self.state)
        for parameter in (*self.state.bank.parameters(), self.state.bank.present):
            vars(parameter)["_ddp_ignored"] = True
        return list(dict.fromkeys([*known, *own, *(f"_orig_mod.{name}" for name in own)]))

    def follow(self) -> None:
        """Use the features that exist now; every process must change its model in the same way."""
        held = self.state.bank.held()
        names = {id(p): name for name, p in reversed([*base_parameters(self.model)])}
        rest = {id(p): p for _, p in base_parameters(self.model)}
        self._rest = [(names[key], p) for key, p in rest.items()]
        watched = {id(p): p for p in (*held.values(), *(p for p in rest.values() if p.requires_grad))}  # fmt: skip
        for key in [key for key in self._hooks if key not in watched]:
            self._hooks.pop(key).remove()
        for key, parameter in watched.items():
            if key not in self._hooks and parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
                self._hooks[key] = handle
        whole = described(self.model, self.state)
        whole.pop("frozen features"), whole.pop("trained heads"), whole.pop("dtypes of heads")
        self._digest = zlib.crc32(digest(whole))

    def stop(self) -> None:
        """Stop reducing. From here on, DDP around the model is refused, because it leaves out the features."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        if self.state.reducer is self:
            self.state.reducer = None
        for parameter in (*self.state.bank.parameters(), self.state.bank.present):
            vars(parameter).pop("_ddp_ignored", None)
        own = {*names_of(self.model, self.state)}
        own |= {f"_orig_mod.{name}" for name in own}
        known = vars(self.model).pop("_ddp_params_and_buffers_to_ignore", ())
        if rest := [name for name in known if name not in own]:
            self.model._ddp_params_and_buffers_to_ignore = rest  # type: ignore[assignment]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forwards and backwards inside send nothing; the next ones outside reduce the accumulated gradients."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    # The end of a backward

    def watch(self, result: Any) -> None:
        """After a forward: find the end of the backward that its result will have."""
        if not torch.is_grad_enabled() or tracing():
            return
        ddp, self._pending = active_ddp(), None
        self._wrapped = ddp is not None
        self._silent = bool(self._quiet) or not getattr(ddp, "require_backward_grad_sync", True)
        if self._silent or not self.automatic:
            return
        for tensor in _tensors(result):
            if tensor.requires_grad:
                tensor.register_hook(self._begin)  # type: ignore[no-untyped-call]

    def _begin(self, *_: Any) -> None:
        """A backward has come to the outputs: reduce when the engine's run, this one, is at its end."""
        run = torch._C._current_graph_task_id()
        if self._pending != run:
            self._pending = run
            Variable._execution_engine.queue_callback(self._finish)

    def _accumulated(self, _: Tensor) -> None:
        """A parameter has its gradient; where the outputs were not watched, this is how a backward is noticed."""
        if self.automatic and self._pending is None and not self._silent and not self._quiet:
            self._begin()

    def _finish(self) -> None:
        self._pending = None
        self.reduce()

    def before_step(self, optimizer: Any) -> None:
        """Before an optimizer's step: a process whose batches gave no gradient takes part here."""
        if self._trained_by(optimizer) and self._seen.get(optimizer, 0) == self._count:
            self.reduce()

    def after_step(self, optimizer: Any) -> None:
        """After an optimizer's step."""
        if self._trained_by(optimizer):
            self._steps += 1
            self._seen[optimizer], self._pending = self._count, None

    def _trained_by(self, optimizer: Any) -> bool:
        own = {id(p) for p in self.state.bank.parameters()}
        own |= {id(p) for _, p in self._rest if p.requires_grad}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    # Reducing

    @torch.no_grad()
    def reduce(self) -> Traffic:
        """Average the gradients over the processes now; every process must call it at the same place.

        Returns:
            What was sent.

        Raises:
            ConfigError: the processes have reached different places, or train different features; raised in every
                process.
        """
        bank = self.state.bank
        held = dict[int, nn.Parameter](bank.held())
        offset = len(bank.features)
        if not self._wrapped:
            held |= {offset + i: p for i, (_, p) in enumerate(self._rest)}
        self._count += 1
        made = Traffic(registered=len(bank.held()), steps=1)
        if self.size > 1:
            found = self._told(held, offset, made)
            self._average({i: held[i] for i in found}, made)
            made.features = sum(i < offset for i in found)
            if self.state.traced:
                self._absent(held, offset, found)
        self.last = made
        self.total.add(made)
        return made

    def _told(self, held: Mapping[int, nn.Parameter], offset: int, made: Traffic) -> list[int]:
        """Which parameters have a gradient in any process, by place; absent features of compiled steps have none."""
        present = self.state.bank.present.tolist() if self.state.traced else None
        acting = [
            i
            for i, p in held.items()
            if p.grad is not None and p.requires_grad and (present is None or i >= offset or present[i])
        ]  # fmt: skip
        trained = bytes(p.requires_grad for p in held.values())
        place = self._steps << 24 | self._count & 0xFFFFFF
        digest = zlib.crc32(trained, self._digest)
        numbers = (place & (1 << 64) - 1).to_bytes(8, "big") + digest.to_bytes(8, "big")
        size = 2 * _NUMBERS + offset + len(self._rest)
        message = torch.zeros(math.ceil(size / _ROUND) * _ROUND, dtype=torch.uint8)
        message[:_NUMBERS] = torch.frombuffer(bytearray(numbers), dtype=torch.uint8)
        message[_NUMBERS : 2 * _NUMBERS] = 255 - message[:_NUMBERS]
        message[[2 * _NUMBERS + i for i in acting]] = 1
        message = message.to(device_for(self.host))
        self._sum(message, dist.ReduceOp.MAX, self.host)
        made.calls, made.told = made.calls + 1, made.told + message.nbytes
        message = message.cpu()
        if not bool((message[:_NUMBERS] == 255 - message[_NUMBERS : 2 * _NUMBERS]).all()):
            self._refuse()  # in all processes: they have all been told the same
        return [i for i in held if message[2 * _NUMBERS + i]] if held else []

    def _refuse(self) -> None:
        """Say in what the processes differ.

        Raises:
            ConfigError: always.
        """
        agree(described(self.model, self.state), self.host)
        places: list[Any] = [None] * self.size
        dist.all_gather_object(places, (self._steps, self._count), group=self.host)
        told = [f"rank {r}: step {s + 1}, reduction {n}" for r, (s, n) in enumerate(places)]
        raise ConfigError(
            f"the processes are out of step ({listed(told)}): each must run as many backwards in "
            f"a step as the others; give all of them batches, or run backwards that are no "
            f"training steps inside reducer.no_sync()"
        )

    def _average(self, chosen: Mapping[int, nn.Parameter], made: Traffic) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in chosen.values():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ConfigError(
                    "a head has sparse gradients, which only DDP reduces; wrap the model in DDP"
                )
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for (dtype, device), parameters in kinds.items():
            sizes = [p.numel() for p in parameters]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
            views = [
                v.view_as(p) for v, p in zip(flat.split_with_sizes(sizes), parameters, strict=True)
            ]
            own = [(v, p.grad) for v, p in zip(views, parameters, strict=True) if p.grad is not None]  # fmt: skip
            if own:
                torch._foreach_copy_([v for v, _ in own], [g for _, g in own])
            flat.div_(self.size)  # first, as DDP does: the sum of halves could overflow
            self._sum(flat, dist.ReduceOp.SUM, self.host if device.type == "cpu" else self.group)
            made.calls, made.sent = made.calls + 1, made.sent + flat.nbytes
            if own:
                torch._foreach_copy_([g for _, g in own], [v for v, _ in own])
            for view, parameter in zip(views, parameters, strict=True):
                if parameter.grad is None:
                    parameter.grad = view.clone()

    def _absent(self, held: Mapping[int, nn.Parameter], offset: int, found: list[int]) -> None:
        """After a compiled step, which gives every feature a gradient: what any process saw is present in all."""
        seen, present = set(found), self.state.bank.present
        present[[i for i in found if i < offset]] = True
        for i, parameter in held.items():
            if i < offset and i not in seen:
                parameter.grad = None

    def _sum(self, tensor: Tensor, op: Any, group: Any) -> None:
        dist.all_reduce(tensor, op, group=group)

    def __str__(self) -> str:
        return f"{self.last} (so far: {self.total})"


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors in what a forward gives back."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, list | tuple | set):
        for value in result:
            yield from _tensors(value)
    elif is_dataclass(result):
        for held in fields(result):
            yield from _tensors(getattr(result, held.name))
