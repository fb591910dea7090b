"""What the torch backend shows the conformance kit (``flix_conformance``): numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flix.backends.torch import (
    adapt,
    add_feature,
    load,
    load_features,
    merge,
    remove_feature,
    rename_feature,
    save,
    trainable_parameters,
)
from flix.backends.torch.kernels.choice import INTERPRETED
from flix.backends.torch.layer import FlixLayer

if TYPE_CHECKING:
    from flix_conformance import AdamW, Batch, Case, Pairs  # type: ignore[import-not-found]


class _Model(nn.Module):
    """A model that is one layer at a path."""

    def __init__(self, path: str, layer: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.add_module(path, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.path)(x)  # type: ignore[no-any-return]


def _tensor(values: NDArray[Any], dtype: str) -> Tensor:
    return torch.from_numpy(values).to(getattr(torch, dtype))


def _plain(case: Case) -> _Model:
    dtype = getattr(torch, case.dtype)
    layer: nn.Module
    if case.kind == "embedding":
        layer = nn.Embedding(case.d_in, case.d_out, dtype=dtype)
        kernel = case.kernel
    else:
        layer = nn.Linear(case.d_in, case.d_out, bias=case.bias is not None, dtype=dtype)
        kernel = case.kernel.T
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(kernel.copy()))  # type: ignore[operator]
        if case.bias is not None:
            layer.bias.copy_(torch.from_numpy(case.bias))  # type: ignore[operator]
    return _Model(case.path, layer)


def _layer(model: nn.Module, path: str) -> FlixLayer:
    layer = model.get_submodule(path)
    assert isinstance(layer, FlixLayer)
    return layer


def _model(case: Case) -> _Model:
    if case.model is not None:
        return case.model  # type: ignore[no-any-return]
    # The kernels have no float64.
    without = case.strategy == "fused" and case.dtype == "float64"
    model = adapt(_plain(case), case.config, strategy="auto" if without else case.strategy)
    with torch.no_grad():
        for feature, a, b in _layer(model, case.path).pairs():
            a.copy_(torch.from_numpy(case.pairs[feature][0]))
            b.copy_(torch.from_numpy(case.pairs[feature][1]))
    return model


def _pairs(model: nn.Module, path: str) -> Pairs:
    return {
        feature: (a.detach().clone().numpy(), b.detach().clone().numpy())
        for feature, a, b in _layer(model, path).pairs()
    }


def _x(case: Case, values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values) if case.kind == "embedding" else _tensor(values, case.dtype)


def _routing(ids: NDArray[Any], weights: NDArray[Any] | None) -> tuple[Tensor, Tensor | None]:
    return torch.from_numpy(ids), None if weights is None else torch.from_numpy(weights)


def _kernel(case: Case, weight: Tensor) -> NDArray[Any]:
    """A kernel as ``[d_in, d_out]``."""
    value = weight.detach()
    value = value.float() if value.dtype == torch.bfloat16 else value
    return (value if case.kind == "embedding" else value.t()).numpy().copy()


class TorchHarness:
    """See ``flix_conformance.harness.Harness``."""

    dtypes = ("float32", "bfloat16", "float64")
    # The kernels take part where Triton interprets them: TRITON_INTERPRET=1.
    strategies = ("auto", "gather", "masked", "single", *(("fused",) if INTERPRETED else ()))
    kinds = ("linear", "embedding")

    def forward(self, case: Case) -> tuple[NDArray[Any], str]:
        ids, weights = _routing(case.ids, case.weights)
        with torch.no_grad():
            y = _model(case)(_x(case, case.x), flix_features=ids, flix_weights=weights)
        return y.double().numpy(), str(y.dtype).removeprefix("torch.")

    def gradients(self, case: Case, dy: NDArray[Any]) -> dict[str, Any]:
        model = _model(case)
        ids, weights = _routing(case.ids, case.weights)
        x = _x(case, case.x)
        if x.is_floating_point():
            x.requires_grad_()
        if weights is not None:
            weights.requires_grad_()
        y = model(x, flix_features=ids, flix_weights=weights)
        if y.requires_grad:
            y.backward(_tensor(dy, case.dtype))
        layer = _layer(model, case.path)
        base, bank = layer.weight.grad, layer.flix_state.bank
        vectors = {i: _gradient(p) for i, p in bank.held().items() if p.grad is not None}
        return {
            "x": None if x.grad is None else x.grad.double().numpy(),
            "weights": _gradient(weights),
            "pairs": {
                bank.features[i]: bank.layout.views(vector, i, layer.flix_place)
                for i, vector in vectors.items()
                if vector is not None
            },
            "base": None if base is None else _kernel(case, base),  # type: ignore[arg-type]
        }

    def train(self, case: Case, batches: Sequence[Batch], optimizer: AdamW) -> dict[str, Any]:
        model = _model(case).train()
        adamw = torch.optim.AdamW(
            trainable_parameters(model),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.decay,
        )
        trajectory = []
        for batch in batches:
            ids, weights = _routing(batch.ids, batch.weights)
            y = model(_x(case, batch.x), flix_features=ids, flix_weights=weights)
            loss = ((y - torch.from_numpy(batch.target)) ** 2).sum() / (2 * len(batch.x))
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            trajectory.append(_pairs(model, case.path))
        return {"pairs": trajectory, "base": _kernel(case, _layer(model, case.path).weight)}  # type: ignore[arg-type]

    def merge(self, case: Case, row: Mapping[str, Any]) -> NDArray[Any]:
        merged = merge(_model(case), row)
        return _kernel(case, merged.get_submodule(case.path).weight)  # type: ignore[arg-type]

    def initial(self, case: Case) -> Pairs:
        return _pairs(adapt(_plain(case), case.config), case.path)

    def save(self, case: Case, folder: Path) -> None:
        save(_model(case), folder)

    def load(self, case: Case, folder: Path) -> Pairs:
        return _pairs(load(_plain(case), folder), case.path)

    def adapted(self, case: Case) -> _Model:
        return _model(case)

    def state(self, model: Any) -> tuple[dict[tuple[str, str], int], Pairs]:
        registry = model.flix_config.registry
        return {f: registry.id(*f) for f in registry.live}, _pairs(model, model.path)

    def add_feature(
        self, model: _Model, group: str, name: str, rank: int, init_from: Sequence[str]
    ) -> None:
        add_feature(model, group, name, rank, init_from=init_from)

    def remove_feature(self, model: _Model, group: str, name: str) -> None:
        remove_feature(model, group, name)

    def rename_feature(self, model: _Model, group: str, name: str, new: str) -> None:
        rename_feature(model, group, name, new)

    def save_features(
        self, model: _Model, folder: Path, features: Sequence[tuple[str, str]]
    ) -> None:
        save(model, folder, features)

    def load_features(self, model: _Model, folder: Path) -> None:
        load_features(model, folder)


def _gradient(parameter: Tensor | None) -> NDArray[Any] | None:
    """A gradient as numpy; zeros where the output does not depend on the parameter."""
    if parameter is None:
        return None
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return np.asarray(grad.double())


def harness() -> TorchHarness:
    """The harness."""
    return TorchHarness()
