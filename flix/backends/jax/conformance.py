"""What the JAX backend shows the conformance kit (``flix_conformance``): numpy in, numpy out.

Outputs and gradients come from the compiled functional core; training, merging and files from an adapted nnx model.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from flix.backends.jax import (
    FlixOptimizer,
    LayerBank,
    adamw,
    adapt,
    add_feature,
    embed,
    linear,
    load,
    load_features,
    merge,
    remove_feature,
    rename_feature,
    save,
    value_and_grad,
)
from flix.backends.jax.kernels.fused import can_run
from flix.backends.jax.layers import FlixLayer, kernel_of
from flix.backends.jax.parameters import make_specs, pack
from flix.core.adapter.adapter import LayerShape

if TYPE_CHECKING:
    from flix_conformance import AdamW, Batch, Case, Pairs  # type: ignore[import-not-found]

F = TypeVar("F", bound=Callable[..., Any])


class _Model(nnx.Module):
    """A model that is one layer at a path."""

    def __init__(self, path: str, layer: nnx.Module) -> None:
        self.path = path
        setattr(self, path, layer)

    def __call__(self, x: Array) -> Array:
        return getattr(self, self.path)(x)  # type: ignore[no-any-return]


def _widened(method: F) -> F:
    """Run a method with 64-bit types where its case has them."""

    @functools.wraps(method)
    def run(self: Any, case: Case, *args: Any, **kwargs: Any) -> Any:
        with jax.enable_x64(case.dtype == "float64"):
            return method(self, case, *args, **kwargs)

    return run  # type: ignore[return-value]


def _array(values: NDArray[Any] | None, dtype: str) -> Array | None:
    return None if values is None else jnp.asarray(values, dtype)


def _bank(case: Case) -> LayerBank:
    if case.model is not None:
        return _layer(case.model, case).bank
    shape = LayerShape(case.d_in, case.d_out, case.kind)
    spec = make_specs(case.config, {case.path: shape})[case.path]
    features = case.registry.live
    empty = np.zeros((0, case.d_in)), np.zeros((case.d_out, 0))
    pairs = {f: case.pairs.get(f, empty) for f in features}
    return pack(spec, pairs, "float64" if case.dtype == "float64" else "float32")


def _x(case: Case, values: NDArray[Any]) -> Array:
    return jnp.asarray(values, "int32" if case.kind == "embedding" else case.dtype)


def _apply(
    x: Array, kernel: Array, bias: Any, layer: LayerBank, ids: Any, weights: Any, strategy: str
) -> Array:
    if layer.spec.shape.kind == "embedding":
        return embed(x, kernel, layer, ids, weights, strategy=strategy)
    return linear(x, kernel, layer, ids, weights, bias=bias, strategy=strategy)


_forward = jax.jit(_apply, static_argnames="strategy")


@functools.partial(jax.jit, static_argnames="strategy")
def _gradients(
    x: Array,
    kernel: Array,
    bias: Any,
    layer: LayerBank,
    ids: Any,
    weights: Any,
    strategy: str,
    dy: Array,
) -> tuple[Any, LayerBank, Any]:
    tokens = x if layer.spec.shape.kind == "embedding" else None

    def of(x: Any, layer: LayerBank, weights: Any) -> Array:
        given = tokens if tokens is not None else x
        return _apply(given, kernel, bias, layer, ids, weights, strategy)

    _, back = jax.vjp(of, None if tokens is not None else x, layer, weights)
    return back(dy)  # type: ignore[no-any-return]


def _arguments(case: Case) -> tuple[Any, ...]:
    return (
        _x(case, case.x),
        _array(case.kernel, case.dtype),
        _array(case.bias, case.dtype),
        _bank(case),
        case.ids,
        case.weights,
        case.strategy,
    )


def _plain(case: Case) -> _Model:
    zeros = nnx.initializers.zeros_init()
    dtype, rngs = jnp.dtype(case.dtype), nnx.Rngs(0)
    layer: Any
    if case.kind == "embedding":
        layer = nnx.Embed(
            case.d_in, case.d_out, param_dtype=dtype, dtype=dtype, embedding_init=zeros, rngs=rngs
        )
        layer.embedding[...] = _array(case.kernel, case.dtype)
    else:
        layer = nnx.Linear(
            case.d_in,
            case.d_out,
            use_bias=case.bias is not None,
            param_dtype=dtype,
            dtype=dtype,
            kernel_init=zeros,
            rngs=rngs,
        )
        layer.kernel[...] = _array(case.kernel, case.dtype)
        if case.bias is not None:
            layer.bias[...] = _array(case.bias, case.dtype)
    return _Model(case.path, layer)


def _layer(model: Any, case: Case) -> FlixLayer:
    layer = getattr(model, case.path)
    assert isinstance(layer, FlixLayer)
    return layer


def _model(case: Case) -> _Model:
    if case.model is not None:
        return case.model  # type: ignore[no-any-return]
    model = adapt(_plain(case), case.config, strategy=case.strategy)
    layer, bank = _layer(model, case), _bank(case)
    layer.flix_A[...], layer.flix_B[...] = bank.A, bank.B
    return model


def _pairs(layer: LayerBank) -> Pairs:
    # Cut on the host: slices on the device would be compiled for every rank.
    a, b = np.asarray(layer.A), np.asarray(layer.B)
    return {
        feature: (a[rows].copy(), b[rows].T.copy())
        for feature in layer.spec.registry.live
        if (rows := layer.spec.row_range(feature)).stop > rows.start
    }


def _loss(model: Any, ids: Any, weights: Any, x: Array, target: Array) -> Array:
    y = model(x, flix_features=ids, flix_weights=weights)
    return ((y - target) ** 2).sum() / (2 * x.shape[0])  # type: ignore[no-any-return]


@nnx.jit
def _step(model: Any, optimizer: Any, ids: Any, weights: Any, x: Array, target: Array) -> None:
    _, gradients = value_and_grad(_loss)(model, ids, weights, x, target)
    optimizer.update(model, gradients)


class JaxHarness:
    """See ``flix_conformance.harness.Harness``."""

    dtypes = ("float32", "bfloat16", "float64")
    strategies = ("auto", "gather", "masked", "single", *(("fused",) if can_run() else ()))
    kinds = ("linear", "embedding")

    @_widened
    def forward(self, case: Case) -> tuple[NDArray[Any], str]:
        x, kernel, bias, bank, ids, weights, strategy = _arguments(case)
        y = _forward(x, kernel, bias, bank, ids, weights, strategy=strategy)
        return np.asarray(y).astype(np.float64), str(y.dtype)

    @_widened
    def refuse(self, case: Case) -> None:
        """Outside of compiled functions, where ids are known."""
        _apply(*_arguments(case))

    @_widened
    def gradients(self, case: Case, dy: NDArray[Any]) -> dict[str, Any]:
        *arguments, strategy = _arguments(case)
        dx, bank, weights = _gradients(*arguments, strategy=strategy, dy=_array(dy, case.dtype))
        return {
            "x": None if dx is None else np.asarray(dx).astype(np.float64),
            "weights": None if weights is None else np.asarray(weights),
            "pairs": _pairs(bank),
            "base": None,  # not differentiated: the gradient is with respect to the bank
        }

    def train(self, case: Case, batches: Sequence[Batch], optimizer: AdamW) -> dict[str, Any]:
        model = _model(case)
        model.train()  # type: ignore[no-untyped-call]
        tx = adamw(optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.decay)
        flix_optimizer = FlixOptimizer(model, tx)
        trajectory = []
        for batch in batches:
            x, target = _x(case, batch.x), jnp.asarray(batch.target)
            _step(model, flix_optimizer, jnp.asarray(batch.ids), batch.weights, x, target)
            trajectory.append(_pairs(_layer(model, case).bank))
        kernel = kernel_of(_layer(model, case))
        return {"pairs": trajectory, "base": np.asarray(kernel[...])}

    @_widened
    def merge(self, case: Case, row: Mapping[str, Any]) -> NDArray[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # merged embeddings warn of attend()
            merged = getattr(merge(_model(case), row), case.path)
        kernel = merged.embedding if case.kind == "embedding" else merged.kernel
        return np.asarray(kernel[...]).astype(np.float64)

    @_widened
    def initial(self, case: Case) -> Pairs:
        return _pairs(_layer(adapt(_plain(case), case.config), case).bank)

    @_widened
    def save(self, case: Case, folder: Path) -> None:
        save(_model(case), folder)

    @_widened
    def load(self, case: Case, folder: Path) -> Pairs:
        return _pairs(_layer(load(_plain(case), folder), case).bank)

    def adapted(self, case: Case) -> _Model:
        return _model(case)

    def state(self, model: Any) -> tuple[dict[tuple[str, str], int], Pairs]:
        registry = model.flix_config.registry
        return {f: registry.id(*f) for f in registry.live}, _pairs(getattr(model, model.path).bank)

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


def harness() -> JaxHarness:
    """The harness."""
    return JaxHarness()
