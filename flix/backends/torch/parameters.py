"""A feature is one parameter: the bank of them, and how a batch's reach its layers (docs/specification.md §5.2).

A feature's pairs of all layers are one vector (see :mod:`flix.core.adapter.flat`), so that optimizers, clipping, DDP,
FSDP2 and paging see as many tensors as there are features. When a batch's routing is put in force, the vectors of its
features are split for all layers at once. Layers read the parts as they are; what passes through autograd is one
*carrier* a layer, whose gradient is that of all the layer's pairs, and one node that makes of the carriers' gradients
each feature's. A slice for each layer would make a whole zero vector for each in the backward.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flix.backends import messages
from flix.backends.torch.patches import optimizers
from flix.backends.torch.resident import Resident
from flix.core.adapter.adapter import Pair
from flix.core.adapter.flat import FlatLayout
from flix.core.errors import listed
from flix.core.features.names import Feature, written

BANK = "flix_bank"
"""The name under which a model, or a layer that is used by hand, holds its bank."""

Values = tuple[list[Tensor], list[Tensor]]
"""A layer's parts of some features: of A, each ``[r * d_in]``, and of B transposed, each ``[r * d_out]``."""


@functools.lru_cache(maxsize=1 << 16)
def parameter_key(feature: Feature) -> str:
    """A feature's name among a model's parameters.

    torch refuses "." in the names of parameters, and ":" parts group from name: names that hold them are escaped.
    """
    escaped = (part.replace("%", "%25").replace(".", "%2E").replace(":", "%3A") for part in feature)
    return ":".join(escaped)


class Bank(Resident):
    """The features' parameters, by name ``<group>:<name>``; features of rank 0 everywhere have none.

    Where kernels of experts are adapted, which by their number hold most of the values, the names end in ``:experts``.

    A model holds it as ``flix_bank``, a layer that is used by hand, too. It is not a step of a model's computation: run
    by a parent that calls its children in turn, it gives back what it was given.

    Attributes:
        features: the registry's features, by id.
        ids: the other way round.
        keys: their names here.
        layout: where pairs lie in the vectors.
        broken: ids of the features that were named for values that are not finite.
        present: buffer: which features a compiled forward has seen since the last optimizer step.
        sharding: how the parameters lie over processes (``distributed.sharding``), or None.
    """

    features: tuple[Feature, ...]
    ids: dict[Feature, int]
    keys: tuple[str, ...]
    layout: FlatLayout
    present: Tensor
    sharding: Any = None

    def __init__(self, features: Sequence[Feature], layout: FlatLayout) -> None:
        super().__init__()
        self.register_buffer("present", torch.zeros(len(features) + 1, dtype=torch.bool), False)
        self.broken: set[int] = set()
        self.arrange(features, layout)

    def arrange(self, features: Sequence[Feature], layout: FlatLayout) -> None:
        """Set the features and the layout; parameters are kept as they are."""
        self.features, self.layout = tuple(features), layout
        _ = layout.starts  # now: compilers cannot trace how what is made once is made
        self.ids = {feature: i for i, feature in enumerate(self.features)}
        ending = ":experts" if any(shape.experts for shape in layout.shapes) else ""
        self.keys = tuple(parameter_key(feature) + ending for feature in features)
        self.present = self.present.new_zeros(len(features) + 1)

    def forward(self, x: Any) -> Any:
        return x

    def hold(self, feature: Feature, parameter: nn.Parameter) -> None:
        """Set a feature's parameter."""
        self._parameters[self.keys[self.ids[feature]]] = parameter

    def parameter(self, feature: int | Feature) -> nn.Parameter | None:
        """A feature's parameter, by id or name; None where it has rank 0 everywhere."""
        place = feature if isinstance(feature, int) else self.ids.get(feature)
        return None if place is None else self._parameters.get(self.keys[place])

    def held(self) -> dict[int, nn.Parameter]:
        """Every parameter by its feature's id."""
        found = self._parameters
        return {i: found[key] for i, key in enumerate(self.keys) if key in found}  # type: ignore[misc]

    def view(self, feature: Feature, place: int) -> tuple[Tensor, Tensor]:
        """A ``[r, d_in]`` and B ``[d_out, r]`` of a feature in a layer: views of its parameter, with their gradient.

        Of kernels of E experts, ``[E, r, d_in]`` and ``[E, d_out, r]``.

        Raises:
            KeyError: the feature has no update in the layer.
        """
        i = self.ids.get(feature)
        rank = 0 if i is None else self.layout.rank(i, place)
        if i is None or not rank:
            raise KeyError(feature)
        value = whole(self._parameters[self.keys[i]])  # type: ignore[arg-type]
        lead = self.layout.shapes[place].lead
        start, middle, end = self.layout.starts[i][2 * place : 2 * place + 3]
        a, b = value[start:middle].view(*lead, rank, -1), value[middle:end].view(*lead, rank, -1)
        return a, b.transpose(-1, -2)

    def array(self, feature: Feature) -> NDArray[Any]:
        """A feature's vector on the host, gathered if it is sharded; halves as float32."""
        return next(self.arrays([feature]))[1]

    def arrays(self, features: Iterable[Feature]) -> Iterator[tuple[Feature, NDArray[Any]]]:
        """The vectors of those features that have parameters, as by :meth:`array`."""
        held = [i for i in map(self.ids.__getitem__, features) if self.parameter(i) is not None]
        if self.sharding is not None:
            values = self.sharding.values(self, held)
        else:
            values = ((i, whole(self.parameter(i).detach())) for i in held)  # type: ignore[union-attr]
        for i, value in values:
            yield self.features[i], (value.float() if value.dtype.itemsize < 4 else value).cpu().numpy()  # fmt: skip

    def fill(self, feature: Feature, vector: NDArray[Any]) -> None:
        """Set a feature's values."""
        set_values(self._parameters[self.keys[self.ids[feature]]], torch.from_numpy(vector))  # type: ignore[arg-type]

    def receive(
        self,
        pairs: Iterable[tuple[str, Mapping[Feature, Pair]]],
        chosen: Collection[Feature],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Give some features parameters, of their pairs by layer; others are not looked at."""
        wide = np.float64 if dtype == torch.float64 else np.float32
        for i, vector in self.layout.packed(self.ids, pairs, chosen, wide).items():
            value = torch.from_numpy(vector).to(device, dtype)
            made = nn.Parameter(value) if self.sharding is None else self.sharding.shard(value)
            self.hold(self.features[i], made)


def whole(value: Tensor) -> Tensor:
    """A tensor gathered, if it is sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def set_values(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter's values; of one that is sharded, each process sets its part of the whole that it is given."""
    with torch.no_grad():
        if hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            placed = value.to(parameter.device, parameter.dtype)
            mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            value = distribute_tensor(placed, mesh, placements, src_data_rank=None)
        parameter.copy_(value)


class InForce:
    """The vectors of a batch's features, split for the layers of a bank.

    Attributes:
        carriers: of each layer, by place: where the gradient of its pairs goes; None where nothing trains.
        grad: whether it was made where gradients are recorded.
        tokens: what layers keep for a token of a generation while no value changes, by place.
    """

    def __init__(self, bank: Bank, ids: Iterable[int], pager: Any, grad: bool) -> None:
        self.bank, self.grad = bank, grad
        self._held = {i: p for i in ids if (p := bank.parameter(i)) is not None}
        self._seen = _seen(self._held.values())
        self.tokens: dict[int, Any] = {}
        if bank.sharding is not None and self._held:
            vectors: dict[int, Tensor] = bank.sharding.in_force(bank, self._held, grad)
        else:
            vectors = {i: whole(parameter) for i, parameter in self._held.items()}
        values = vectors if pager is None else pager.vectors(self._held)
        self._warn(values)
        self._vectors = {i: value.detach() for i, value in values.items()}
        self.carriers: tuple[Tensor, ...] | None = None
        if grad and any(vector.requires_grad for vector in vectors.values()):
            where = next(iter(values.values())).device
            self.carriers = Spread.apply(bank, self._held, where, *vectors.values())  # type: ignore[no-untyped-call]

    def _warn(self, values: Mapping[int, Tensor]) -> None:
        """Name, once, the features whose values are not finite; on a device only where no gradients are recorded.

        There one look would make every step wait for the device.
        """
        new = {i: v for i, v in values.items() if i not in self.bank.broken}
        if not new or (self.grad and next(iter(new.values())).device.type != "cpu"):
            return
        if not math.isfinite(torch.stack([v.sum() for v in new.values()]).sum().item()):
            broken = [i for i, v in new.items() if not v.isfinite().all()]
            self.bank.broken.update(broken)
            if broken:
                names = [written(self.bank.features[i]) for i in broken]
                warnings.warn(messages.not_finite(names), stacklevel=2)

    def fresh(self) -> bool:
        """Whether the parameters are what they were."""
        now = [self.bank.parameter(i) for i in self._held]
        return self._seen is not None and self._seen == _seen(now)

    def values(self, active: Sequence[int], place: int, device: torch.device) -> Values:
        """A layer's parts of some features, on a device."""
        side, parts = 2 * place, self.parts
        a, b = [parts[i][side] for i in active], [parts[i][side + 1] for i in active]
        if a[0].device != device:  # layers of one model may lie on several devices
            a, b = [part.to(device) for part in a], [part.to(device) for part in b]
        return a, b

    def carrier(self, place: int) -> Tensor | None:
        """Where the gradient of a layer's pairs goes; None where none is recorded."""
        return self.carriers[place] if self.carriers and torch.is_grad_enabled() else None

    def vector(self, feature: int) -> Tensor:
        """A feature's, by id."""
        return self._vectors[feature]

    @cached_property
    def parts(self) -> dict[int, tuple[Tensor, ...]]:
        """Of each feature, by id: A and B transposed of each layer in turn; kernels go by addresses and need none."""
        sizes = self.bank.layout.sizes
        return {i: v.split_with_sizes(sizes[i]) for i, v in self._vectors.items()}  # type: ignore[misc]

    @cached_property
    def addresses(self) -> tuple[torch.device, tuple[Any, ...]] | None:
        """On which device the vectors lie, and what their places there follow from: dtype, ids and addresses.

        None where they are not of one dtype, on one device and contiguous. Ids and dtype count, for freed memory is
        used again: another feature may lie there then, or values of another dtype.
        """
        vectors = self._vectors.values()
        kinds = {(v.dtype, v.device, v.is_contiguous()) for v in vectors}
        dtype, where, contiguous = kinds.pop()
        if kinds or not contiguous:
            return None
        return where, (dtype, *self._vectors, *(v.data_ptr() for v in vectors))


def _seen(held: Iterable[Any]) -> tuple[Any, ...] | None:
    """What differs after any of some parameters has changed; None where that cannot be told.

    A tensor counts its changes, but not those that fused optimizers make; so optimizers' steps count, too.
    """
    parameters = list(held)
    if any(p is None or p.is_inference() or hasattr(p, "device_mesh") for p in parameters):
        return None
    found = [(id(p), p._version, p.requires_grad, p.data_ptr()) for p in parameters]
    return (optimizers.steps, *found)


class Spread(torch.autograd.Function):
    """From the vectors of a batch's features to a carrier for each layer, and from their gradients the way back.

    A carrier has the size of its layer's pairs, ``[A of each feature, B transposed of each]``, and no memory of its
    own. Nothing is saved for the backward, so that reentrant checkpoints can come here once for each of their pieces.
    """

    @staticmethod
    def forward(
        ctx: Any, bank: Bank, held: Mapping[int, Tensor], where: torch.device, *vectors: Tensor
    ) -> tuple[Tensor, ...]:
        sizes = [bank.layout.sizes[i] for i in held]
        ctx.bank, ctx.held, ctx.sizes = bank, held, sizes
        ctx.devices = [vector.device for vector in vectors]
        ctx.versions = [None if p.is_inference() else p._version for p in held.values()]
        ctx.set_materialize_grads(False)
        one = torch.zeros(1, dtype=vectors[0].dtype, device=where)
        totals = map(sum, zip(*sizes, strict=True))
        return tuple(one.expand(a + b) for a, b in zip(totals, totals, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _refuse_changed(ctx)
        features = zip(ctx.sizes, ctx.devices, ctx.needs_input_grad[3:], strict=True)
        # Neighbours of one shape are one matrix in each layer's gradient: hundreds of views fewer than one by one.
        runs = [(*key, len(list(run))) for key, run in itertools.groupby(features)]
        pieces: list[list[Tensor | int]] = [[] for _ in runs]  # of A and B, layer by layer
        for place, grad in enumerate(grads):
            sides = (2 * place, 2 * place + 1)
            lengths = [sizes[side] * count for side in sides for sizes, *_, count in runs]
            parts = None if grad is None else iter(grad.split_with_sizes(lengths))
            for side in sides:
                for held, (sizes, *_, count) in zip(pieces, runs, strict=True):
                    size = sizes[side]
                    held.append(size if parts is None else next(parts).view(count, size))
        found: list[Tensor | None] = []
        for (_, device, needed, count), held in zip(runs, pieces, strict=True):
            found += _joined(held, count).to(device).unbind(0) if needed else [None] * count
        return (None, None, None, *found)


def _joined(pieces: Sequence[Tensor | int], count: int) -> Tensor:
    """One matrix of many, side by side; numbers stand for that many columns of zeros."""
    if all(type(piece) is Tensor for piece in pieces):
        return torch.cat(pieces, 1)  # type: ignore[arg-type]
    like = next(piece for piece in pieces if not isinstance(piece, int))
    made: list[Tensor] = []
    for missing, group in itertools.groupby(pieces, lambda piece: isinstance(piece, int)):
        some: list[Any] = list(group)
        made += [like.new_zeros(count, sum(some))] if missing else some
    return torch.cat(made, 1)


def _refuse_changed(ctx: Any) -> None:
    held = ctx.held.items()
    changed = [
        written(ctx.bank.features[i])
        for (i, p), version in zip(held, ctx.versions, strict=True)
        if version is not None and p._version != version
    ]
    if changed:
        raise RuntimeError(
            f"the values of {listed(changed)} were changed between a forward and its backward, whose gradients would "
            "be wrong; change them after the backward"
        )


class Carried(torch.autograd.Function):
    """A layer's parts as tensors with a gradient, which goes to the layer's carrier: for plain operations on them."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.device = carrier.device
        return tuple(part.view_as(part) for part in (*a, *b))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.cat(grads).to(ctx.device), None, None
