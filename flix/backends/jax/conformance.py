"""What the JAX backend shows the conformance kit (``flix_conformance``) beside its verbs: numpy in, numpy out.

Gradients come from the pure functions on a layer's bank, outputs and training from the adapted nnx model.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from flix.backends.jax import (
    FlixOptimizer,
    LayerBank,
    adamw,
    embed,
    linear,
    search_weights,
    value_and_grad,
    ways,
)
from flix.backends.jax.kernels.fused import can_run
from flix.backends.jax.layers import FlixParam, kernel_of

if TYPE_CHECKING:
    from flix_conformance import AdamW, Batch, Layer  # type: ignore[import-not-found]

_KEPT = 1000
"""Models after which compiled programs are let go: each maps memory, and a process has some 65,000 such maps on Linux.
The nightly profile came to more, and XLA ended the process."""


class _Model(nnx.Module):
    """Layers, one after another, over flat inputs; what stands before a path's first dot is a module of its own."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.forms: dict[str, str] = {}
        for head, group in groupby(layers, lambda layer: layer.path.partition(".")[0]):
            inner = [replace(layer, path=layer.path.partition(".")[2]) for layer in group]
            setattr(self, head, _Model(inner) if inner[0].path else _plain(inner[0]))
            self.forms[head] = inner[0].form
        self.paths = tuple(self.forms)

    def __call__(self, x: Any) -> Any:
        for path, form in self.forms.items():
            given, lead = x, x.shape[:-1]
            if form in ("general", "out"):
                given = x.reshape(*lead, 2, x.shape[-1] // 2)
            y = getattr(self, path)(given)
            x = y.reshape(*lead, -1) if form else y
        return x


_EINSUMS = {"heads": "...d,ndh->...nh", "out": "...nh,dnh->...d"}


def _formed(layer: Layer, given: dict[str, Any]) -> nnx.Module:
    """A linear map whose kernel has three or four axes."""
    d_in, d_out = layer.kernel.shape
    made: Any
    kernel: Any
    if layer.form == "general":  # [in, in, out, out]
        made = nnx.LinearGeneral((2, d_in // 2), (2, d_out // 2), axis=(-2, -1), **given)
        kernel = layer.kernel.reshape(2, d_in // 2, 2, d_out // 2)
    elif layer.form == "heads":  # [out, in, out]
        shape = (2, d_in, d_out // 2)
        made = nnx.Einsum(_EINSUMS["heads"], shape, (2, d_out // 2), **given)
        kernel = layer.kernel.reshape(d_in, 2, d_out // 2).swapaxes(0, 1)
    else:  # [out, in, in]
        made = nnx.Einsum(_EINSUMS["out"], (d_out, 2, d_in // 2), (d_out,), **given)
        kernel = layer.kernel.T.reshape(d_out, 2, d_in // 2)
    made.kernel[...] = jnp.asarray(kernel, layer.dtype)
    made.bias[...] = jnp.asarray(layer.bias, layer.dtype).reshape(made.bias.shape)
    return made  # type: ignore[no-any-return]


class OwnForward(nnx.Linear):
    """A subclass with a forward of its own, around which features act."""

    def __call__(self, x: Any) -> Any:  # type: ignore[override]
        y = jnp.matmul(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...]


def _plain(layer: Layer) -> nnx.Module:
    dtype, zeros = jnp.dtype(layer.dtype), nnx.initializers.zeros_init()
    given: dict[str, Any] = {"param_dtype": dtype, "dtype": dtype, "rngs": nnx.Rngs(0)}
    made: Any
    if layer.form and layer.form != "own forward":
        return _formed(layer, given)
    if layer.kind == "embedding":
        made = nnx.Embed(*layer.kernel.shape, embedding_init=zeros, **given)
    else:
        bias = layer.bias is not None
        kind = OwnForward if layer.form else nnx.Linear
        made = kind(*layer.kernel.shape, use_bias=bias, kernel_init=zeros, **given)
        if bias:
            made.bias[...] = jnp.asarray(layer.bias, dtype)
    kernel_of(made)[...] = jnp.asarray(layer.kernel, dtype)
    return made  # type: ignore[no-any-return]


def _at(model: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), model)


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


def _through(model: Any, batch: Batch, dy: NDArray[Any]) -> tuple[Any, LayerBank, Any]:
    """The same through the adapted model itself."""
    graph, tables, rest = nnx.split(model, FlixParam, ...)  # type: ignore[misc]

    def of(x: Any, tables: Any, weights: Any) -> Any:
        made = nnx.merge(graph, tables, rest)
        return made(x, flix_features=batch.ids, flix_weights=weights)

    @jax.jit
    def gradients(given: Any, dy: Any) -> Any:
        return jax.vjp(of, *given)[1](dy)

    given = _x(batch), tables, batch.weights
    dx, found, weights = gradients(given, jnp.asarray(dy, batch.dtype))
    (path,) = model.paths
    a, b = (found[path][name][...] for name in ("flix_A", "flix_B"))
    return dx, LayerBank(a, b, getattr(model, path).flix_spec), weights


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
    nested = True
    forms = ("general", "heads", "out", "own forward")
    id_dtypes = ("int32", "int64", "int16", "int8", "uint8")

    def within(self, dtype: str) -> Any:
        return jax.enable_x64(dtype == "float64")

    def __init__(self) -> None:
        self.models = 0

    def plain(self, layers: Sequence[Layer], x: NDArray[Any]) -> _Model:
        self.models += 1
        if self.models % _KEPT == 0:
            jax.clear_caches()  # type: ignore[no-untyped-call]
        return _Model(layers)

    def call(self, model: Any, batch: Batch, path: str | None = None) -> tuple[NDArray[Any], str]:
        module = model if path is None else _at(model, path)
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
        if any(model.forms.values()):
            dx, bank, weights = _through(model, batch, dy)
        else:
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

    def search(self, model: Any, batch: Batch, row: Any, **options: Any) -> Any:
        def loss(y: Any, _: Any) -> Any:
            return ((y - batch.target) ** 2).sum() / (2 * len(y))

        return search_weights(model, {"x": _x(batch)}, row, loss=loss, **options)

    def kernel(self, model: Any, path: str) -> NDArray[Any]:
        layer = _at(model, path)
        kernel = np.asarray(kernel_of(layer)[...])
        if isinstance(layer, nnx.LinearGeneral):
            return kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)
        if isinstance(layer, nnx.Einsum) and layer.einsum_str == _EINSUMS["heads"]:
            return kernel.swapaxes(0, 1).reshape(kernel.shape[1], -1)
        return kernel.reshape(len(kernel), -1).T if isinstance(layer, nnx.Einsum) else kernel


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
