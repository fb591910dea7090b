"""Paged banks: features that live on the host, with the ones in use copied to the device (docs/specification.md §5.2).

With thousands of features a bank can outgrow the device, though a batch uses a few of them. Under :func:`page` the
features' parameters (and so the optimizer's state) stay in host memory; a batch's features are copied to the device and
kept there for the batches to come while they fit a budget, the least recently used going first. Routing is known before
the step, so the coming batch's copies can be started early: ``pager.prefetch(next_routing)``. Gradients return to the
host with the backward. The numbers are those of an unpaged model, bit for bit.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from flix.backends.torch._context import ActiveRouting, host_ids
from flix.backends.torch.model import flix_layers, require_adapted
from flix.core.errors import ConfigError, listed
from flix.core.features.registry import Feature
from flix.core.features.routing import Routing


@dataclass
class _Page:
    """One feature on the device: its pairs by layer, and the state of the host's parameters that they are copies of."""

    values: dict[str, tuple[Tensor, Tensor]]
    versions: tuple[int, ...]
    size: int
    stepped: bool = False  # whether an optimizer may have changed the host's parameters since
    ready: Any = None  # the event after which the copies are there, on CUDA


_pagers: weakref.WeakSet[Pager] = weakref.WeakSet()


def _after_step(*_: Any) -> None:
    for pager in _pagers:
        pager.after_step()


register_optimizer_step_post_hook(_after_step)


class Pager:
    """What keeps a model's features in use on the device; made by :func:`page`.

    Attributes:
        device: where the model runs.
        budget: the most bytes of features that stay there.
        resident: bytes of features that are there.
        peak: the most that were.
        copied: bytes copied to the device in all.
    """

    def __init__(self, model: nn.Module, device: torch.device, budget: int) -> None:
        self.device, self.budget = device, budget
        self.resident = self.peak = self.copied = 0
        self._pages: OrderedDict[int, _Page] = OrderedDict()
        self._model = model
        self._layers = [layer for _, layer in flix_layers(model)]
        _pagers.add(self)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copies of a model are not paged: their features are fetched layer by layer until they are."""
        return None

    def prefetch(self, features: Any) -> None:
        """Start copying a coming batch's features to the device; the step that uses them then need not wait.

        Args:
            features: the batch's ids, or its :class:`flix.Routing`.

        Raises:
            ConfigError: they take more than the budget.
        """
        ids = features.ids if isinstance(features, Routing) else host_ids(features)
        self._load(np.unique(ids[ids >= 0]).tolist())

    def load(self, routing: ActiveRouting) -> None:
        """Have a forward's features on the device.

        Raises:
            ConfigError: they take more than the budget.
        """
        ids = routing.flat
        self._load({*np.unique(ids[ids >= 0]).tolist(), *routing.touched})

    def values(self, layer: str, active: Iterable[int]) -> list[Tensor]:
        """A of each active feature in a layer, then B of each, on the device."""
        pages = [self._pages.get(i) for i in active]
        if any(found is None for found in pages):
            # Recomputation, after batches in between have taken the place.
            self._load(set(active))
            pages = [self._pages[i] for i in active]
        if self._stream is not None:
            self._await([found for found in pages if found is not None])
        pairs = [found.values[layer] for found in pages if found is not None]
        return [*(a for a, _ in pairs), *(b for _, b in pairs)]

    def _await(self, pages: list[_Page]) -> None:
        now = torch.cuda.current_stream(self.device)
        for found in pages:
            if found.ready is not None:
                now.wait_event(found.ready)
                for pair in found.values.values():
                    for tensor in pair:
                        tensor.record_stream(now)
                found.ready = None

    def _load(self, wanted: Iterable[int]) -> None:
        wanted = sorted(wanted)
        parameters = {i: self._parameters(i) for i in wanted}
        sizes = {i: sum(p.nbytes for _, p in parameters[i]) for i in wanted}
        need = sum(sizes.values())
        if need > self.budget:
            names = [":".join(self._features[i]) for i in wanted]
            raise ConfigError(
                f"the batch's {len(wanted)} features ({listed(names, 5)}) take {need:,} bytes on "
                f"{self.device}, but the budget of page() is {self.budget:,}; raise the budget, or mix "
                "fewer features in a batch"
            )
        missing = []
        for i in wanted:
            versions = tuple(p._version for _, p in parameters[i])
            known = self._pages.get(i)
            if known is not None and known.versions == versions and not known.stepped:
                self._pages.move_to_end(i)
                continue
            if known is not None:
                self._drop(i)
            missing.append((i, versions))
        kept = set(wanted)
        for i in [i for i in self._pages if i not in kept]:
            if self.resident + sum(sizes[j] for j, _ in missing) <= self.budget:
                break
            self._drop(i)
        for i, versions in missing:
            self._pages[i] = self._copied(parameters[i], versions, sizes[i])
            self.resident += sizes[i]
            self.copied += sizes[i]
        self.peak = max(self.peak, self.resident)

    def forget(self) -> None:
        """Drop every page: the model's features or layers have changed."""
        self._pages.clear()
        self.resident = 0
        self._layers = [layer for _, layer in flix_layers(self._model)]

    def after_step(self) -> None:
        """An optimizer has stepped: what has a gradient may have moved, and fused optimizers leave no other trace."""
        for i, found in self._pages.items():
            if any(p.grad is not None for _, p in self._parameters(i)):
                found.stepped = True

    def _drop(self, i: int) -> None:
        self.resident -= self._pages.pop(i).size

    def _copied(
        self, parameters: list[tuple[str, Tensor]], versions: tuple[int, ...], size: int
    ) -> _Page:
        values: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.no_grad(), torch.cuda.stream(self._stream):
            copies = [p.to(self.device, non_blocking=True, copy=True) for _, p in parameters]
            ready = self._stream.record_event() if self._stream is not None else None
        for (layer, _), a, b in zip(parameters[::2], copies[::2], copies[1::2], strict=True):
            values[layer] = a, b
        return _Page(values, versions, size, ready=ready)

    def _parameters(self, i: int) -> list[tuple[str, Tensor]]:
        """(layer, A), (layer, B) of a feature in each layer where it has an update, on the host."""
        feature = self._features[i]
        return [
            (layer.flix_name, bank[feature])
            for layer in self._layers
            if feature in layer.flix_A
            for bank in (layer.flix_A, layer.flix_B)
        ]

    @property
    def _features(self) -> tuple[Feature, ...]:
        return self._model.flix_config.registry.features  # type: ignore[union-attr,return-value]


def page(model: nn.Module, budget: int, *, device: Any = None) -> Pager:
    """Keep an adapted model's features in host memory, and those in use on the device, within a budget.

    Give the optimizer its parameters after this call. ``save``, ``merge``, ``add_feature`` and the rest work as ever;
    ``model.to(...)`` afterwards would move the features, too.

    Args:
        model: an adapted model; its base stays where it is.
        budget: the most bytes that features take on the device; each batch's must fit.
        device: where the base runs; default: where it is.

    Returns:
        The pager, whose ``prefetch`` starts the copies for a coming batch.

    Raises:
        TargetError: the model is not adapted.
        ConfigError: a budget below 1, or parameters that are sharded.
    """
    require_adapted(model, "page")
    if budget < 1:
        raise ConfigError(f"page() needs a budget of at least one byte, got {budget}")
    layers = list(flix_layers(model))
    where = torch.device(device) if device is not None else layers[0][1].weight.device  # type: ignore[arg-type]
    assert isinstance(where, torch.device)
    for path, layer in layers:
        for _, *pair in layer.pairs():
            for parameter in pair:
                if hasattr(parameter, "device_mesh"):
                    raise ConfigError(f"layer {path!r} is sharded; a sharded bank cannot be paged")
                host = parameter.detach().cpu()
                parameter.data = host.pin_memory() if where.type == "cuda" else host
    pager = Pager(model, where, budget)
    vars(model)["flix_pager"] = pager
    return pager


def unpage(model: nn.Module) -> None:
    """Bring all features back to where the base is, and let go of the pager.

    Raises:
        TargetError: the model is not adapted.
    """
    require_adapted(model, "unpage")
    vars(model).pop("flix_pager", None)
    for _, layer in flix_layers(model):
        for _, *pair in layer.pairs():
            for parameter in pair:
                parameter.data = parameter.data.to(layer.weight.device)  # type: ignore[arg-type]
