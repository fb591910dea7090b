"""The other ways to call and to train an adapted model, for the conformance kit (see :mod:`.conformance`)."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.typing import NDArray

import flix
from flix.backends.jax import (
    FlixOptimizer,
    FlixParam,
    adamw,
    adapt,
    embed,
    embed_rows,
    export_fn,
    gather,
    linear,
    linear_rows,
    load_bank,
    merge,
    merge_kernels,
    primitives,
    route,
    save,
    scatter,
    shard,
    sparse_update,
    touched,
)
from flix.backends.jax.layers import kernel_of

if TYPE_CHECKING:
    from flix_conformance import AdamW, Batch  # type: ignore[import-not-found]

Way = Callable[[Any, Any], tuple[NDArray[Any], str]]


def _x(batch: Batch) -> Any:
    return jnp.asarray(batch.x, "int32" if batch.x.dtype.kind == "i" else batch.dtype)


def _answer(y: Any) -> tuple[NDArray[Any], str]:
    return np.asarray(y).astype(np.float64), str(y.dtype)


def _called(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    return _answer(model(_x(batch), flix_features=batch.ids, flix_weights=batch.weights))


def _layer(model: Any) -> Any:
    return getattr(model, model.paths[0])


def _copied(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    return _called(copy.deepcopy(model), batch)


def _with_routing(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """A :class:`flix.Routing` in place of ids and weights."""
    weights = np.ones(batch.ids.shape, np.float32) if batch.weights is None else batch.weights
    routing = flix.Routing(batch.ids, weights, model.flix_config.registry)
    return _answer(model(_x(batch), flix_features=routing))


def _by_hand(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """The layer under ``route``."""
    with route(model.flix_config.registry, batch.ids, batch.weights):
        return _answer(_layer(model)(_x(batch)))


def _inside(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """A compiled function within a call of a larger one, and within a rematerialised one."""

    @nnx.jit
    def outer(model: Any, x: Any, ids: Any, weights: Any) -> Any:
        @nnx.remat
        def inner(model: Any, x: Any) -> Any:
            return model(x, flix_features=ids, flix_weights=weights)

        return inner(model, x)

    return _answer(outer(model, _x(batch), batch.ids, batch.weights))


def _mapped(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """The pure functions, mapped over rows."""
    layer = _layer(model)
    kernel, bias = kernel_of(layer)[...], getattr(layer, "bias", None)
    weights = jnp.ones(batch.ids.shape) if batch.weights is None else jnp.asarray(batch.weights)
    strategy, tokens = layer.flix_strategy, layer.bank.spec.shape.kind == "embedding"

    def of(x: Any, ids: Any, weights: Any) -> Any:
        alone = batch.ids.ndim == 3 or x.ndim == 0
        if alone:
            x, ids, weights = x[None], ids[None], weights[None]
        if tokens:
            y = embed(x, kernel, layer.bank, ids, weights, strategy=strategy)
        else:
            held = None if bias is None else bias[...]
            y = linear(x, kernel, layer.bank, ids, weights, bias=held, strategy=strategy)
        return y[0] if alone else y

    if strategy == "single":  # a batch's rows are told apart where it is whole
        return _called(model, batch)
    return _answer(jax.vmap(of)(_x(batch), jnp.asarray(batch.ids), weights))


def _pure(model: Any, x: Any, ids: Any, weights: Any, bank: Any, present: Any) -> Any:
    layer, path = _layer(model), model.paths[0]
    kernel, bias = kernel_of(layer)[...], getattr(layer, "bias", None)
    rows, strategy = gather(bank, present)[path], layer.flix_strategy
    if rows.spec.shape.kind == "embedding":
        return embed_rows(x, kernel, rows, ids, present, weights, strategy=strategy)
    held = None if bias is None else bias[...]
    return linear_rows(x, kernel, rows, ids, present, weights, bias=held, strategy=strategy)


def _gathered(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """The pure functions over the rows of a bank that was saved, gathered and put back."""
    bank = primitives.bank_of(model)
    present = touched(batch.ids, len(model.flix_config.registry))
    if next(iter(bank.values())).A.dtype == jnp.float32:
        with tempfile.TemporaryDirectory() as name:
            save((model.flix_config, bank), Path(name) / "adapter")
            _, bank = load_bank(Path(name) / "adapter")
    bank = scatter(bank, gather(bank, present), present)
    return _answer(_pure(model, _x(batch), batch.ids, batch.weights, bank, present))


def _on_a_mesh(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """The pure functions over a bank that is placed on a mesh, of one device here."""
    mesh = jax.make_mesh((1, 1), ("in", "out"), axis_types=(AxisType.Auto, AxisType.Auto))
    kernels = {model.paths[0]: PartitionSpec("in", "out")}  # type: ignore[no-untyped-call]
    bank = shard(primitives.bank_of(model), mesh, kernels)
    present = touched(batch.ids, len(model.flix_config.registry))
    y = _answer(_pure(model, _x(batch), batch.ids, batch.weights, bank, present))
    layer = _layer(model)
    strategy = layer.flix_strategy
    if not isinstance(layer, nnx.Linear):
        return y
    sizes, biased = (layer.in_features, layer.out_features), layer.bias is not None
    plain = nnx.Linear(*sizes, use_bias=biased, rngs=nnx.Rngs(0))
    placed = NamedSharding(mesh, kernels[model.paths[0]])
    plain.kernel[...] = jax.device_put(kernel_of(layer)[...], placed)
    plain.bias = layer.bias
    twin = adapt(_One(model.paths[0], plain), model.flix_config, strategy=strategy)
    return _called(primitives.write(twin, primitives.read(model)), batch)


def _row(model: Any, batch: Batch, row: int) -> dict[str, dict[str, float]]:
    """A row's composition; what others would bring along is named, with the weight 0."""
    registry, found = model.flix_config.registry, dict[str, dict[str, float]]()
    for group, name in registry.live:
        found.setdefault(group, {})[name] = 0.0
    for place, number in enumerate(batch.ids[row]):
        if number >= 0:
            group, name = registry.features[number]
            found[group][name] += 1.0 if batch.weights is None else float(batch.weights[row, place])
    return found


def _merged_each(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Each row by the kernel that its composition is merged into."""
    if batch.ids.ndim > 2 or not len(batch.ids):
        return _called(model, batch)
    layer, path, x = _layer(model), model.paths[0], _x(batch)
    config, bank, found = model.flix_config, primitives.bank_of(model), []
    kernel, bias = kernel_of(layer)[...], getattr(layer, "bias", None)
    for row in range(len(batch.ids)):
        own = _row(model, batch, row)
        merged = merge_kernels(config, bank, {path: kernel}, own)[path]
        if bank[path].spec.shape.kind == "embedding":
            found.append(merged[x[row]])
        else:
            y = jnp.matmul(x[row], merged, precision="highest")
            found.append(y if bias is None else y + bias[...])
    return _answer(jnp.stack(found))


class _Quantised(nnx.Module):
    """Stands for quantised layers of other libraries: a forward, integers, and no kernel that is known as one."""

    def __init__(self, kernel: Any, bias: Any) -> None:
        self.in_features, self.out_features = kernel.shape
        self.integers = nnx.Variable(jnp.zeros(kernel.shape, jnp.int8))
        self.held = nnx.Variable(kernel)
        self.offset = None if bias is None else nnx.Variable(bias)

    def __call__(self, x: Any) -> Any:
        y = jnp.matmul(x, self.held[...])
        return y if self.offset is None else y + self.offset[...]


class _One(nnx.Module):
    """A model of one layer."""

    def __init__(self, path: str, layer: nnx.Module) -> None:
        self.path = path
        setattr(self, path, layer)

    def __call__(self, x: Any) -> Any:
        return getattr(self, self.path)(x)


def _over_a_quantised(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Over a layer of another library's kind; and each row by a plain one that it and a composition are made into."""
    layer, path, x = _layer(model), model.paths[0], _x(batch)
    if layer.bank.spec.shape.kind == "embedding" or batch.ids.ndim > 2 or not len(batch.ids):
        return _called(model, batch)
    bias = getattr(layer, "bias", None)
    plain = _One(path, _Quantised(kernel_of(layer)[...], None if bias is None else bias[...]))
    twin = adapt(plain, model.flix_config, strategy=layer.flix_strategy)
    twin = primitives.write(twin, primitives.read(model))
    y, dtype = _called(twin, batch)
    for row, one in enumerate(x):
        merged = merge(twin, _row(model, batch, row), dequantize=True)
        off = np.abs(np.asarray(merged(one[None]), np.float64)[0] - y[row]).max(initial=0)
        bound = {"bfloat16": 0.05, "float32": 1e-3}.get(dtype, 1e-9)
        assert off <= bound * max(1.0, np.abs(y).max(initial=1)), "merged otherwise"
    return y, dtype


def _over_scales(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """The pure functions over a kernel of halves with the scale 2."""
    layer = _layer(model)
    kernel, bias, tokens = kernel_of(layer)[...], getattr(layer, "bias", None), layer.bank.spec.shape.kind == "embedding"  # fmt: skip
    scale = jnp.full((1, 1), 2, kernel.dtype)
    halves = {"kernel": kernel / 2, "scale": scale, "zero_point": jnp.zeros_like(scale)}
    given = layer.bank, batch.ids, batch.weights
    if tokens:
        return _answer(embed(_x(batch), halves, *given, strategy=layer.flix_strategy))
    held = None if bias is None else bias[...]
    y = linear(_x(batch), halves, *given, bias=held, strategy=layer.flix_strategy)
    again = linear(_x(batch), lambda x: x @ kernel, *given, bias=held, strategy=layer.flix_strategy)
    assert jnp.allclose(y, again, 1e-2, 1e-2), "a function gives otherwise"
    return _answer(y)


def _exported(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """A pure function of parameters, compiled."""
    function, parameters = export_fn(model)
    return _answer(jax.jit(function)(parameters, _x(batch), batch.ids, batch.weights))


def ways() -> dict[str, Way]:
    """See ``flix_conformance.harness.Harness``."""
    return {
        "copied": _copied,
        "with a flix.Routing": _with_routing,
        "a layer by hand": _by_hand,
        "inside compiled functions": _inside,
        "mapped": _mapped,
        "rows of a bank": _gathered,
        "on a mesh": _on_a_mesh,
        "each row merged": _merged_each,
        "over a quantised layer": _over_a_quantised,
        "over scales": _over_scales,
        "exported": _exported,
    }


def _loss(y: Any, target: Any) -> Any:
    return ((y - target) ** 2).sum() / (2 * len(target))


def _adamw(s: AdamW) -> Any:
    return adamw(s.lr, s.beta1, s.beta2, s.eps, s.decay)


def _told(model: Any, batches: Sequence[Batch], settings: AdamW, say: bool) -> None:
    model.train()
    optimizer = FlixOptimizer(model, _adamw(settings))
    wrt = nnx.DiffState(0, FlixParam)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, ids: Any, weights: Any, target: Any) -> None:
        def of(model: Any) -> Any:
            return _loss(model(x, flix_features=ids, flix_weights=weights), target)

        told = {"flix_features": ids} if say else {}
        optimizer.update(model, nnx.grad(of, argnums=wrt)(model), **told)

    for batch in batches:
        step(model, optimizer, _x(batch), batch.ids, batch.weights, batch.target)


def _banked(model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
    """The pure functions and a bank."""
    bank, tx = primitives.bank_of(model), _adamw(settings)
    state, count = tx.init(bank), len(model.flix_config.registry)

    @jax.jit
    def step(bank: Any, state: Any, x: Any, ids: Any, weights: Any, target: Any) -> Any:
        present = touched(ids, count)
        rows = gather(bank, present)

        def of(rows: Any) -> Any:
            return _loss(_pure(model, x, ids, weights, scatter(bank, rows, present), present), target)  # fmt: skip

        return sparse_update(tx, jax.grad(of)(rows), state, bank, present)

    for batch in batches:
        bank, state = step(bank, state, _x(batch), batch.ids, batch.weights, batch.target)
    _layer(model).put(bank[model.paths[0]])


def loops() -> dict[str, Callable[..., None]]:
    """See ``flix_conformance.harness.Harness``."""
    return {
        "nnx's gradients, and ids": functools.partial(_told, say=True),
        "a bank": _banked,
    }
