"""The other ways to call an adapted model, for the conformance kit (see :mod:`.conformance`)."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import flix
from flix.backends.torch import (
    FlixEmbedding,
    FlixLinear,
    adapt,
    page,
    primitives,
    route,
    routed,
    share_base,
    unpage,
)
from flix.backends.torch import merge as flix_merge

if TYPE_CHECKING:
    from flix_conformance import Batch  # type: ignore[import-not-found]

Way = Callable[[Any, Any], tuple[NDArray[Any], str]]


def _x(batch: Batch) -> Tensor:
    x = torch.from_numpy(batch.x)
    return x.to(getattr(torch, batch.dtype)) if x.is_floating_point() else x


def _ids(batch: Batch) -> tuple[Tensor, Tensor | None]:
    weights = None if batch.weights is None else torch.from_numpy(batch.weights)
    return torch.from_numpy(batch.ids), weights


def _answer(y: Tensor) -> tuple[NDArray[Any], str]:
    return y.detach().double().numpy(), str(y.dtype).removeprefix("torch.")


def _called(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    ids, weights = _ids(batch)
    with torch.no_grad():
        return _answer(model(_x(batch), flix_features=ids, flix_weights=weights))


def _copied(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    return _called(copy.deepcopy(model), batch)


def _pickled(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return _called(torch.load(file, weights_only=False), batch)


def _shared(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Another model over the same base, with the same features."""
    twin = adapt(share_base(model), model.flix_config, strategy=model.flix_state.strategy)
    return _called(primitives.write(twin, primitives.read(model)), batch)


class _Generating(nn.Sequential):
    """Gives one position after the other, as generation does: each with the routing of those before it, too."""

    def generate(self, x: Tensor, flix_features: Tensor, flix_weights: Tensor | None) -> Tensor:
        found = []
        for end in range(1, x.shape[1] + 1):
            given = (flix_features, flix_weights)
            ids, weights = (v if v is None or v.dim() < 3 else v[:, :end] for v in given)
            y = self(x[:, end - 1 : end], flix_features=ids, flix_weights=weights)
            found.append(y)
        return torch.cat(found, 1)


def _generated(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """By a model's own ``generate``, whose routing is given as arrays."""
    x, floating = _x(batch), not isinstance(model[0], nn.Embedding)
    if x.dim() < 2 + floating:
        return _called(model, batch)
    plain = share_base(model)
    plain.__class__ = _Generating
    twin = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    primitives.write(twin, primitives.read(model)).eval()
    with torch.no_grad():
        return _answer(twin.generate(x, flix_features=batch.ids, flix_weights=batch.weights))


class _Flattening(nn.Sequential):
    """Makes one sequence of all rows, as models do that have no batch inside."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.dim() - (not isinstance(self[0], nn.Embedding))
        y = super().forward(x.flatten(0, tokens - 1))  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:tokens], -1)  # type: ignore[no-any-return]


def _flattened(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Rows of one composition together, of which the layers see no rows."""
    if batch.ids.ndim > 2 or not len(batch.ids):
        return _called(model, batch)
    plain = share_base(model)
    plain.__class__ = _Flattening
    twin = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    primitives.write(twin, primitives.read(model))
    (ids, weights), x, found = _ids(batch), _x(batch), []
    for row in range(len(x)):
        given = [None if v is None else v[[row, row]] for v in (ids, weights)]
        with torch.no_grad():
            y = twin(x[[row, row]], flix_features=given[0], flix_weights=given[1])
        found.append(y[:1])
    return _answer(torch.cat(found))


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it looks up, as Gemma's and BART's do."""

    embed_scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


def _scaled(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """With an embedding that doubles halves of the same values."""
    if not isinstance(model[0], nn.Embedding):
        return _called(model, batch)
    plain: Any = copy.deepcopy(share_base(model))
    plain[0].__class__ = ScaledEmbedding
    with torch.no_grad():
        plain[0].weight.mul_(0.5)
    twin = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    halves = {
        path: {feature: (a, b * 0.5) for feature, (a, b) in pairs.items()}
        for path, pairs in primitives.read(model).items()
    }
    return _called(primitives.write(twin, halves), batch)


def _resized(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """With a larger vocabulary, as models of transformers are given one."""
    if not isinstance(model[0], nn.Embedding):
        return _called(model, batch)
    plain = copy.deepcopy(share_base(model))
    plain.__class__ = _Resizable
    twin: Any = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    primitives.write(twin, primitives.read(model))
    twin.resize_token_embeddings(len(twin[0].weight) + 3)
    return _called(twin, batch)


class _Resizable(nn.Sequential):
    """Takes another vocabulary as models of transformers do: by a new layer."""

    def resize_token_embeddings(self, size: int) -> nn.Module:
        old: Any = self[0]
        made = nn.Embedding(size, old.weight.shape[1], dtype=old.weight.dtype)
        with torch.no_grad():
            made.weight[: len(old.weight)] = old.weight
        setattr(self, next(iter(self._modules)), made)
        return made


class BitLinear(nn.Module):
    """Stands for the layers of quantised models that are known by their classes' names: a forward, and no kernel."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.compute_dtype = like.weight.dtype
        self.register_buffer("held", like.weight.detach().clone())
        self.bias = like.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.held, self.bias)  # type: ignore[arg-type]


def _row(model: Any, ids: NDArray[Any], weights: NDArray[Any] | None) -> dict[str, Any]:
    """A composition as a row; what others would bring along is named, with the weight 0."""
    registry, row = model.flix_config.registry, dict[str, Any]()
    for group, name in registry.live:
        row.setdefault(group, {})[name] = 0.0
    for place, number in enumerate(ids):
        if number >= 0:
            group, name = registry.features[number]
            row[group][name] += 1.0 if weights is None else float(weights[place])
    return row


def _merged_each(model: Any, batch: Batch, dequantize: bool = False) -> tuple[NDArray[Any], str]:
    """Each row by a model that its composition is merged into."""
    if batch.ids.ndim > 2 or not len(batch.ids):
        return _called(model, batch)
    x, found = _x(batch), []
    for row, ids in enumerate(batch.ids):
        own = _row(model, ids, None if batch.weights is None else batch.weights[row])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what else reads a kernel
            merged = flix_merge(model, own, dequantize=dequantize)
        with torch.no_grad():
            found.append(merged(x[row : row + 1]))
    return _answer(torch.cat(found))


def _quantised(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Over a layer of a class that quantised models have, and merged into a plain one made of it."""
    if not isinstance(model[0], nn.Linear):
        return _called(model, batch)
    plain = copy.deepcopy(share_base(model))
    setattr(plain, next(iter(plain._modules)), BitLinear(plain[0]))  # type: ignore[index]
    twin = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    primitives.write(twin, primitives.read(model))
    y, _ = _merged_each(twin, batch, dequantize=True)
    found = _called(twin, batch)
    _alike(y, found[0], batch, "merged")
    _alike(_slope(twin, batch), _slope(model, batch), batch, "the gradient of x")
    return found


def _slope(model: Any, batch: Batch) -> NDArray[Any]:
    """The gradient of x that could be differentiated again, and is that of one backward."""
    x, (ids, weights) = _x(batch).requires_grad_(), _ids(batch)
    y = model(x, flix_features=ids, flix_weights=weights)
    (again,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (once,) = torch.autograd.grad(y.sum(), x)
    first, second = (v.detach().double().numpy() for v in (again, once))
    _alike(first, second, batch, "the gradient, again,")
    return once.double().numpy()  # type: ignore[no-any-return]


def _alike(y: NDArray[Any], wanted: NDArray[Any], batch: Batch, what: str) -> None:
    bound = {"float64": 1e-9, "float32": 1e-3}.get(batch.dtype, 0.05)
    size = np.abs(wanted).max(initial=1)
    assert np.allclose(y, wanted, bound, bound * size), f"{what} differs"


class _Windowed(nn.Sequential):
    """Cuts each row's positions into windows, which go through the layers as if they were rows, in two orders."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        windows = torch.stack(x.unbind(1), 1).reshape(batch * length, 1, size)
        y = super().forward(windows)  # type: ignore[no-untyped-call]
        return y.view(batch, length, -1)  # type: ignore[no-any-return]


def _in_windows(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Row by row of windows, as models of images have them."""
    if batch.x.ndim != 3 or batch.ids.ndim > 2 or 0 in batch.x.shape:
        return _called(model, batch)
    plain = share_base(model)
    plain.__class__ = _Windowed
    twin = adapt(plain, model.flix_config, strategy=model.flix_state.strategy)
    return _called(primitives.write(twin, primitives.read(model)), batch)


def _offloaded(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """With the base in the host's memory, whose parts come where they are used, by accelerate's hooks."""
    copied = copy.deepcopy(model)
    import_module("accelerate").cpu_offload(copied, torch.device("cpu"))
    return _called(copied, batch)


def _with_routing(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """A :class:`flix.Routing` in place of ids and weights, in inference mode, twice over."""
    weights = np.ones(batch.ids.shape, np.float32) if batch.weights is None else batch.weights
    routing = flix.Routing(batch.ids, weights, model.flix_config.registry)
    with torch.inference_mode():
        model.eval()(_x(batch), flix_features=routing)
        return _answer(model.train()(_x(batch), flix_features=routing))


def _each_row(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Row by row, under ``routed`` where one composition serves a row."""
    rows, x = [], _x(batch)
    for row in range(len(x)):
        ids, weights = batch.ids[row : row + 1], batch.weights
        weights = np.ones(ids.shape, np.float32) if weights is None else weights[row : row + 1]
        one = flix.Routing(ids, np.where(ids < 0, 0, weights).astype(np.float32), model.flix_config.registry)  # fmt: skip
        with torch.no_grad():
            if ids.ndim > 2:
                rows.append(model(x[row : row + 1], flix_features=one))
                continue
            with routed(model, one):
                rows.append(model(x[row : row + 1]))
                again = model.eval()(x[row : row + 1]), model.train()[0](x[row : row + 1])
                assert all(torch.allclose(y, rows[-1], atol=1e-4) for y in again)
    return _answer(torch.cat(rows))


def _by_hand(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """The layer under ``route``."""
    ids, weights = _ids(batch)
    with torch.no_grad(), route(model.flix_config.registry, ids, weights):
        return _answer(model[0](_x(batch)))


def _own_layer(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """A layer that was made by hand, with the same values."""
    layer, config = model[0], model.flix_config
    options = {"config": config, "name": layer.flix_name, "strategy": layer.flix_strategy}
    dtype, made = layer.weight.dtype, layer.weight.detach()
    if isinstance(layer, nn.Embedding):
        own: Any = FlixEmbedding(*made.shape, dtype=dtype, **options)
    else:
        bias = layer.bias is not None
        own = FlixLinear(layer.d_in, layer.d_out, bias, dtype=dtype, **options)
    own.load_state_dict(layer.state_dict() | own.flix_bank.state_dict(prefix="flix_bank."))
    with torch.no_grad():
        for feature, a, b in layer.pairs():
            own.flix_A[feature].copy_(a)
            own.flix_B[feature].copy_(b)
    ids, weights = _ids(batch)
    return _answer(own(_x(batch), flix_features=ids, flix_weights=weights))


def _mapped(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Through torch.func: the parameters as arguments, and each row mapped over."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    ids, weights = _ids(batch)
    weights = torch.ones(ids.shape) if weights is None else weights

    def called(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        given = {"flix_features": ids[None], "flix_weights": weights[None]}
        return torch.func.functional_call(model, values, (x[None],), given)[0]  # type: ignore[no-any-return]

    return _answer(torch.func.vmap(called)(_x(batch), ids, weights))


def _paged(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """With the features in the host's memory, a batch of them at a time where it runs."""
    pager = page(model, 1 << 20)
    try:
        pager.prefetch(torch.from_numpy(batch.ids))
        return _called(model, batch)
    finally:
        unpage(model)


def ways() -> dict[str, Way]:
    """See ``flix_conformance.harness.Harness``."""
    return {
        "copied": _copied,
        "pickled": _pickled,
        "over a shared base": _shared,
        "by generate": _generated,
        "flattened": _flattened,
        "in windows": _in_windows,
        "with a larger vocabulary": _resized,
        "with an embedding that scales": _scaled,
        "each row merged": _merged_each,
        "over a quantised layer": _quantised,
        **({"offloaded": _offloaded} if find_spec("accelerate") else {}),
        "with a flix.Routing": _with_routing,
        "each row under routed": _each_row,
        "a layer by hand": _by_hand,
        "a layer of its own": _own_layer,
        "torch.func": _mapped,
        "paged": _paged,
    }
