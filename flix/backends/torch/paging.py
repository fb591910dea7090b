"""Paged banks: features that live on the host, with the ones in use copied to the device (docs/specification.md §5.2).

With thousands of features a bank can outgrow the device, though a batch uses a few of them. Under :func:`page` the
features' parameters (and so the optimizer's state) stay in host memory; a batch's features are copied to the device and
kept there for the batches to come while they fit a budget, the least recently used going first. Routing is known before
the step, so the coming batch's copies can be started early: ``pager.prefetch(next_routing)``. Gradients return to the
host with the backward, a copy a feature. The numbers are those of an unpaged model, bit for bit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flix.backends.torch.layer import flix_layers
from flix.backends.torch.parameters import Bank
from flix.backends.torch.patches.hooked import device_of
from flix.backends.torch.patches.models import state_of
from flix.backends.torch.routing import host_ids
from flix.core.errors import ConfigError, listed
from flix.core.features.names import written
from flix.core.features.routing import Routing


@dataclass
class _Page:
    """One feature's vector on the device, and the version of the host's that it is a copy of."""

    value: Tensor
    version: int
    stepped: bool = False  # whether an optimizer may have changed the host's since
    ready: Any = None  # the event after which the copy is there, on CUDA


class Pager:
    """Keeps the features in use on the device; made by :func:`page`.

    Attributes:
        device: where the model runs.
        budget: the most bytes of features that stay there.
        resident: bytes of features that are there now.
        peak: the most bytes that were there at once.
        copied: bytes copied to the device so far.
    """

    def __init__(self, bank: Bank, device: torch.device, budget: int) -> None:
        self.device: torch.device = device
        self.budget: int = budget
        self.resident: int = 0
        self.peak: int = 0
        self.copied: int = 0
        self._pages: OrderedDict[int, _Page] = OrderedDict()
        self._bank = bank
        self._lock = threading.RLock()  # threads that serve one model share its pages
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def prefetch(self, features: Any) -> None:
        """Start copying the features of a later batch to the device, so that the step that uses them need not wait.

        Args:
            features: the batch's ids, or its :class:`flix.Routing`.

        Raises:
            ConfigError: they take more than the budget.
        """
        ids = features.ids if isinstance(features, Routing) else host_ids(features)
        with self._lock:
            self._load(np.unique(ids[ids >= 0]).tolist())

    def vectors(self, wanted: Mapping[int, Any]) -> dict[int, Tensor]:
        """The vectors of some features on the device.

        Raises:
            ConfigError: they take more than the budget.
        """
        with self._lock:
            self._load(wanted)
            return self._ready({i: self._pages[i] for i in wanted})

    def _ready(self, pages: dict[int, _Page]) -> dict[int, Tensor]:
        if self._stream is not None:
            now = torch.cuda.current_stream(self.device)
            for found in pages.values():
                if found.ready is not None:
                    now.wait_event(found.ready)
                    found.value.record_stream(now)
                    found.ready = None
        return {i: found.value for i, found in pages.items()}

    def _load(self, ids: Iterable[int]) -> None:
        wanted = {i: p for i in sorted(ids) if (p := self._bank.parameter(i)) is not None}
        need = sum(p.nbytes for p in wanted.values())
        if need > self.budget:
            names = [written(self._bank.features[i]) for i in wanted]
            raise ConfigError(
                f"the batch's {len(wanted)} features ({listed(names, 5)}) take {need:,} bytes on "
                f"{self.device}, but the budget of page() is {self.budget:,}; raise the budget, or mix "
                "fewer features in a batch"
            )
        missing = []
        for i, parameter in wanted.items():
            if i in self._pages:
                self._pages.move_to_end(i)
                if self._pages[i].version == parameter._version and not self._pages[i].stepped:
                    continue
                self._drop(i)
            missing.append(i)
        for i in [i for i in self._pages if i not in wanted]:
            if self.resident + sum(wanted[j].nbytes for j in missing) <= self.budget:
                break
            self._drop(i)
        for i in missing:
            self._pages[i] = found = self._copied(wanted[i])
            self.resident += found.value.nbytes
            self.copied += found.value.nbytes
        self.peak = max(self.peak, self.resident)

    def forget(self) -> None:
        """Drop every page: the model's features have changed."""
        with self._lock:
            self._pages.clear()
            self.resident = 0

    def after_step(self) -> None:
        """After an optimizer's step: what has a gradient may have moved (fused optimizers leave no trace)."""
        for i, found in list(self._pages.items()):
            parameter = self._bank.parameter(i)
            if parameter is None or parameter.grad is not None:
                found.stepped = True

    def _drop(self, i: int) -> None:
        self.resident -= self._pages.pop(i).value.nbytes

    def _copied(self, parameter: Tensor) -> _Page:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            copy = parameter.to(self.device, non_blocking=True, copy=True)
            ready = self._stream.record_event() if self._stream is not None else None
        return _Page(copy, parameter._version, ready=ready)


def page(model: nn.Module, budget: int, *, device: Any = None) -> Pager:
    """Keep an adapted model's features in host memory, and those in use on the device, within a budget.

    Give the optimizer its parameters after this call. ``save``, ``merge``, ``add_feature`` and the other verbs work
    as usual. ``model.to(...)`` afterwards would also move the features.

    Args:
        model: an adapted model; its base stays where it is.
        budget: the most bytes that features may take on the device; the features of each batch must fit.
        device: where the base runs; default: where it is.

    Returns:
        The pager, whose ``prefetch`` starts the copies for a coming batch.

    Raises:
        TargetError: the model is not adapted.
        ConfigError: a budget below 1, or parameters that are sharded.
    """
    state = state_of("page", model)
    if budget < 1:
        raise ConfigError(f"page() needs a budget of at least one byte, got {budget}")
    where = _base_device(model) if device is None else torch.device(device)
    for i, parameter in state.bank.held().items():
        if hasattr(parameter, "device_mesh"):
            name = written(state.bank.features[i])
            raise ConfigError(f"the parameter of {name} is sharded; a sharded bank cannot be paged")
        host = parameter.detach().cpu()
        parameter.data = host.pin_memory() if where.type == "cuda" else host
    pager = state.pager = Pager(state.bank, where, budget)
    return pager


def unpage(model: nn.Module) -> None:
    """Move all features back to where the base is, and remove the pager.

    Raises:
        TargetError: the model is not adapted.
    """
    state = state_of("unpage", model)
    state.pager = None
    for parameter in state.bank.parameters():
        parameter.data = parameter.data.to(_base_device(model))


def _base_device(model: nn.Module) -> torch.device:
    return device_of(next(getattr(layer, "module", layer) for _, layer in flix_layers(model)))
