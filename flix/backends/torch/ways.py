"""The other ways to call and to train an adapted model, for the conformance kit (see :mod:`.conformance`)."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flix
from flix.backends.torch import (
    FlixEmbedding,
    FlixLinear,
    adapt,
    page,
    parameter_groups,
    primitives,
    route,
    routed,
    share_base,
    unpage,
)

if TYPE_CHECKING:
    from flix_conformance import AdamW, Batch  # type: ignore[import-not-found]

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
        "with a flix.Routing": _with_routing,
        "each row under routed": _each_row,
        "a layer by hand": _by_hand,
        "a layer of its own": _own_layer,
        "torch.func": _mapped,
        "paged": _paged,
    }


def _steps(
    model: Any,
    batches: Sequence[Batch],
    settings: AdamW,
    call: Callable[[Batch], Tensor],
    grouped: bool = False,
    **options: Any,
) -> None:
    s = settings
    trained: Any = primitives.parameters(model)
    if grouped:
        trained = parameter_groups(model, s.lr, weight_decay=dict.fromkeys(model.flix_config.registry.groups, s.decay))  # fmt: skip
    adamw = torch.optim.AdamW(trained, s.lr, (s.beta1, s.beta2), s.eps, s.decay, **options)
    for batch in batches:
        adamw.zero_grad()
        target = torch.from_numpy(batch.target)
        (((call(batch) - target) ** 2).sum() / (2 * len(target))).backward()  # type: ignore[no-untyped-call]
        adamw.step()


def _reentrant(model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
    """The layer inside a reentrant checkpoint, under routing from around it; not of tokens, which want no gradient."""
    floating = not isinstance(model[0], nn.Embedding)

    def call(batch: Batch) -> Tensor:
        with route(model.flix_config.registry, *_ids(batch)):
            return checkpoint(model[0], _x(batch), use_reentrant=floating)  # type: ignore[no-any-return]

    _steps(model.train(), batches, settings, call)


def _checkpointed(model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
    """The same, in the other mode of checkpoints."""

    def call(batch: Batch) -> Tensor:
        with route(model.flix_config.registry, *_ids(batch)):
            return checkpoint(model[0], _x(batch), use_reentrant=False)  # type: ignore[no-any-return]

    _steps(model.train(), batches, settings, call)


def _compiled(model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
    torch._dynamo.reset()
    run = torch.compile(model.train(), backend="aot_eager", fullgraph=True)

    def call(batch: Batch) -> Tensor:
        ids, weights = _ids(batch)
        return run(_x(batch), flix_features=ids, flix_weights=weights)  # type: ignore[no-any-return, no-untyped-call]

    _steps(model, batches, settings, call)


def _fused(model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
    """torch's fused optimizer, by groups of parameters; it is evaluated between steps."""

    def call(batch: Batch) -> Tensor:
        _called(model.eval(), batch)
        ids, weights = _ids(batch)
        return model.train()(_x(batch), flix_features=ids, flix_weights=weights)  # type: ignore[no-any-return]

    _steps(model, batches, settings, call, grouped=True, fused=True)


def _paged_steps(model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
    page(model, 1 << 20)
    try:
        _fused(model, batches, settings)
    finally:
        unpage(model)


def loops() -> dict[str, Callable[..., None]]:
    """See ``flix_conformance.harness.Harness``."""
    return {
        "reentrant checkpoints": _reentrant,
        "checkpoints": _checkpointed,
        "compiled": _compiled,
        "fused, by groups": _fused,
        "paged": _paged_steps,
    }
