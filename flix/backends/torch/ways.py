"""The other ways to call an adapted model, for the conformance kit (see :mod:`.conformance`)."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
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
    from flix.backends.torch import twins  # which is made of what stands above

    return {
        "copied": _copied,
        "pickled": _pickled,
        "over a shared base": _shared,
        "by generate": twins.generated,
        "flattened": twins.flattened,
        "in windows": twins.in_windows,
        "in an attention": twins.attending,
        "as a convolution": twins.convolving,
        "with a larger vocabulary": twins.resized,
        "with an embedding that scales": twins.scaled,
        "each row merged": _merged_each,
        "over a quantised layer": twins.quantised,
        **({"offloaded": twins.offloaded} if find_spec("accelerate") else {}),
        "with a flix.Routing": _with_routing,
        "each row under routed": _each_row,
        "a layer by hand": _by_hand,
        "a layer of its own": _own_layer,
        "torch.func": _mapped,
        "paged": _paged,
    }
