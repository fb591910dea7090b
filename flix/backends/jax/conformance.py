"""What the JAX backend shows the conformance kit (``flix_conformance``) beside its verbs: numpy in, numpy out.

Gradients come from the pure functions on a layer's bank, outputs and training from the adapted nnx model.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from flix.backends.jax import FlixOptimizer, LayerBank, adamw, embed, linear, value_and_grad, ways
from flix.backends.jax.kernels.fused import can_run
from flix.backends.jax.layers import kernel_of

if TYPE_CHECKING:
    from flix_conformance import AdamW, Batch, Layer  # type: ignore[import-not-found]


class _Model(nnx.Module):
    """Layers, one after another."""

    def __init__(self, layers: dict[str, nnx.Module]) -> None:
        self.paths = tuple(layers)
        for path, layer in layers.items():
            setattr(self, path, layer)

    def __call__(self, x: Any) -> Any:
        for path in self.paths:
            x = getattr(self, path)(x)
        return x


def _plain(layer: Layer) -> nnx.Module:
    dtype, zeros = jnp.dtype(layer.dtype), nnx.initializers.zeros_init()
    given: dict[str, Any] = {"param_dtype": dtype, "dtype": dtype, "rngs": nnx.Rngs(0)}
    made: Any
    if layer.kind == "embedding":
        made = nnx.Embed(*layer.kernel.shape, embedding_init=zeros, **given)
    else:
        bias = layer.bias is not None
        made = nnx.Linear(*layer.kernel.shape, use_bias=bias, kernel_init=zeros, **given)
        if bias:
            made.bias[...] = jnp.asarray(layer.bias, dtype)
    kernel_of(made)[...] = jnp.asarray(layer.kernel, dtype)
    return made  # type: ignore[no-any-return]


def _x(batch: Batch) -> Any:
    return jnp.asarray(batch.x, "int32" if batch.x.dtype.kind == "i" else batch.dtype)


def _routing(batch: Batch) -> dict[str, Any]:
    given = {"flix_features": batch.ids, "flix_weights": batch.weights}
    return {name: value for name, value in given.items() if value is not None}


# A call changes no model; written back, its attributes are gone for a moment, which other threads see.
@nnx.jit(graph_updates=False)
def _call(module: Any, x: Any, routing: dict[str, Any]) -> Any:
    return module(x, **routing)


@nnx.jit(graph_updates=False)
def _part(module: Any, x: Any, routing: dict[str, Any]) -> Any:
    return _call(module, x, routing) * 1


@functools.partial(jax.jit, static_argnames="strategy")
def _gradients(
    x: Any, kernel: Any, bias: Any, bank: LayerBank, ids: Any, weights: Any, dy: Any, strategy: str
) -> Any:
    tokens = bank.spec.shape.kind == "embedding"

    def of(given: Any, bank: LayerBank, weights: Any) -> Any:
        if tokens:
            return embed(x, kernel, bank, ids, weights, strategy=strategy)
        return linear(given, kernel, bank, ids, weights, bias=bias, strategy=strategy)

    return jax.vjp(of, None if tokens else x, bank, weights)[1](dy)


def _given(model: Any, batch: Batch, dy: NDArray[Any]) -> tuple[Any, ...]:
    """What :func:`_gradients` takes."""
    layer = getattr(model, model.paths[0])
    bias, given = getattr(layer, "bias", None), jnp.asarray(dy, batch.dtype)
    base = kernel_of(layer)[...], None if bias is None else bias[...]
    return _x(batch), *base, layer.bank, batch.ids, batch.weights, given, layer.flix_strategy


def _largest(program: Any) -> int:
    """The bytes of the largest array that some step of a program makes, those of the programs in it included."""
    sizes = [0]
    for step in program.eqns:
        inner = [p for p in jax.tree.leaves([*step.params.values()]) if hasattr(p, "eqns")]
        inner += [p.jaxpr for p in jax.tree.leaves([*step.params.values()]) if hasattr(p, "jaxpr")]
        made = [] if inner else [v.aval for v in step.outvars]
        sizes += [*map(_largest, inner), *(a.size * a.dtype.itemsize for a in made)]
    return max(sizes)


def _loss(model: Any, ids: Any, weights: Any, x: Any, target: Any) -> Any:
    y = model(x, flix_features=ids, flix_weights=weights)
    return ((y - target) ** 2).sum() / (2 * x.shape[0])


@nnx.jit
def _step(model: Any, optimizer: Any, ids: Any, weights: Any, x: Any, target: Any) -> None:
    _, gradients = value_and_grad(_loss)(model, ids, weights, x, target)
    optimizer.update(model, gradients)


@functools.cache
def _adamw(s: AdamW) -> Any:
    """Made once: compiled steps know it by its identity."""
    return adamw(s.lr, s.beta1, s.beta2, s.eps, s.decay)


class JaxHarness:
    """See ``flix_conformance.harness.Harness``."""

    dtypes = ("float32", "bfloat16", "float64")
    strategies = ("auto", "gather", "masked", "single", *(("fused",) if can_run() else ()))
    kinds = ("linear", "embedding")
    id_dtypes = ("int32", "int64", "int16", "int8", "uint8")

    def within(self, dtype: str) -> Any:
        return jax.enable_x64(dtype == "float64")

    def plain(self, layers: Sequence[Layer], x: NDArray[Any]) -> _Model:
        return _Model({layer.path: _plain(layer) for layer in layers})

    def call(self, model: Any, batch: Batch, path: str | None = None) -> tuple[NDArray[Any], str]:
        module = model if path is None else getattr(model, path)
        y = _call(module, _x(batch), _routing(batch))
        return np.asarray(y).astype(np.float64), str(y.dtype)

    def evaluated(self, model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
        model.eval()
        try:
            return self.call(model, batch)
        finally:
            model.train()

    def refuse(self, model: Any, batch: Batch) -> None:
        """Outside of compiled functions, where ids are known."""
        model(_x(batch), **_routing(batch))

    def gradients(self, model: Any, batch: Batch, dy: NDArray[Any]) -> dict[str, Any]:
        dx, bank, weights = _gradients(*_given(model, batch, dy))
        return {
            "x": None if dx is None else np.asarray(dx).astype(np.float64),
            "weights": None if weights is None else np.asarray(weights),
            "pairs": bank.spec.pairs(np.asarray(bank.A), np.asarray(bank.B)),
            "base": None,  # not differentiated: the gradient is with respect to the bank
        }

    def largest(self, model: Any, batch: Batch, dy: NDArray[Any]) -> int:
        """Of the arrays that the program names, before it is compiled."""
        return _largest(jax.make_jaxpr(_gradients, static_argnums=7)(*_given(model, batch, dy)))

    def trainer(self, model: Any, settings: AdamW) -> Callable[[Batch], None]:
        model.train()
        optimizer = FlixOptimizer(model, _adamw(settings))

        def step(batch: Batch) -> None:
            ids = None if batch.ids is None else jnp.asarray(batch.ids)
            target = jnp.asarray(batch.target)
            _step(model, optimizer, ids, batch.weights, _x(batch), target)

        return step

    def compiled_forward(self, model: Any) -> Callable[[Batch], tuple[NDArray[Any], str]]:
        """``call`` is compiled already; here it is one part of a larger function."""

        def called(batch: Batch) -> tuple[NDArray[Any], str]:
            y = _part(model, _x(batch), _routing(batch))
            return np.asarray(y).astype(np.float64), str(y.dtype)

        return called

    def fit(self, model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
        """All steps in one compiled scan."""
        model.train()
        optimizer = FlixOptimizer(model, _adamw(settings))
        weighted = batches[0].weights is not None

        @jax.jit
        def steps(state: Any, given: Any) -> Any:
            def body(state: Any, batch: Any) -> tuple[Any, None]:
                model, optimizer = nnx.merge(graph, state)
                _, gradients = value_and_grad(_loss)(model, **batch)
                optimizer.update(model, gradients)
                return nnx.state((model, optimizer)), None

            return jax.lax.scan(body, state, given)[0]

        graph, state = nnx.split((model, optimizer))
        given = {
            "ids": jnp.stack([b.ids for b in batches]),
            "weights": jnp.stack([jnp.asarray(b.weights) for b in batches]) if weighted else None,
            "x": jnp.stack([_x(b) for b in batches]),
            "target": jnp.stack([b.target for b in batches]),
        }
        nnx.update((model, optimizer), steps(state, given))

    def ways(self) -> dict[str, Any]:
        return ways.ways()

    def loops(self) -> dict[str, Any]:
        return ways.loops()

    def kernel(self, model: Any, path: str) -> NDArray[Any]:
        return np.asarray(kernel_of(getattr(model, path))[...])


def _keep_programs() -> None:
    """Compiled programs are kept between runs, in the user's cache, unless JAX was told where to keep them.

    Those of one processor may not run on another: each has a folder of its own.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    info = Path("/proc/cpuinfo")
    flags = [x for x in info.read_text().splitlines() if x.startswith(("flags", "Features"))] if info.exists() else []  # fmt: skip
    machine = hashlib.sha256("".join([platform.machine(), *flags[:1]]).encode()).hexdigest()[:12]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "flix-conformance" / f"jax-{jax.__version__}-{machine}"
    for name, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(name, value)  # type: ignore[no-untyped-call]


def harness() -> JaxHarness:
    """The harness; compiled programs are kept."""
    _keep_programs()
    return JaxHarness()
