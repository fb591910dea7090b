"""The other ways to train an adapted model, for the conformance kit (see :mod:`.conformance`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flix.backends.torch import page, parameter_groups, primitives, route, unpage
from flix.backends.torch.ways import _called, _ids, _x

if TYPE_CHECKING:
    from flix_conformance import AdamW, Batch  # type: ignore[import-not-found]


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


def _twice(model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
    """Gradients that could be differentiated again."""
    parameters = primitives.parameters(model.train())
    s = settings
    adamw = torch.optim.AdamW(parameters, s.lr, (s.beta1, s.beta2), s.eps, s.decay)
    for batch in batches:
        ids, weights = _ids(batch)
        y = model(_x(batch), flix_features=ids, flix_weights=weights)
        target = torch.from_numpy(batch.target)
        loss = ((y - target) ** 2).sum() / (2 * len(target))
        found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = None if gradient is None else gradient.detach()
        adamw.step()


def loops() -> dict[str, Callable[..., None]]:
    """See ``flix_conformance.harness.Harness``."""
    return {
        "reentrant checkpoints": _reentrant,
        "checkpoints": _checkpointed,
        "compiled": _compiled,
        "fused, by groups": _fused,
        "paged": _paged_steps,
        "gradients of gradients": _twice,
    }
