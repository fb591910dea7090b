"""The other ways to call and to train an adapted model, for the conformance kit (see :mod:`.conformance`)."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

import flix
from flix.backends.keras.parameters import kernel_of
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import (
    FlixDense,
    FlixEmbedding,
    adapt,
    keep_absent,
    merge,
    primitives,
    route,
)

if TYPE_CHECKING:
    from flix_conformance.harness import AdamW, Batch  # type: ignore[import-not-found]

Way = Callable[[Any, Any], tuple[NDArray[Any], str]]


def _x(batch: Batch) -> Any:
    return tf.constant(batch.x, tf.int32 if batch.x.dtype.kind in "iu" else batch.dtype)


def _given(batch: Batch) -> dict[str, Any]:
    found = {"inputs": _x(batch), "flix_features": tf.constant(batch.ids)}
    return found if batch.weights is None else {**found, "flix_weights": tf.constant(batch.weights)}


def _answer(y: Any) -> tuple[NDArray[Any], str]:
    return np.asarray(tf.cast(y, tf.float64)), tf.as_dtype(y.dtype).name


def _copied(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    return _answer(copy.deepcopy(model)(_given(batch)))


def _with_routing(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """A :class:`flix.Routing` in place of ids and weights."""
    weights = np.ones(batch.ids.shape, np.float32) if batch.weights is None else batch.weights
    routing = flix.Routing(batch.ids, weights, model.flix_config.registry)
    return _answer(model({"inputs": _x(batch), "flix_features": routing}))


def _by_hand(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """The layer under ``route``."""
    ((_, layer),) = flix_layers(model.base)
    with route(model.flix_config.registry, batch.ids, batch.weights):
        return _answer(layer(_x(batch)))


def _own_layer(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """A layer that was made by hand, with the same values."""
    ((path, layer),) = flix_layers(model.base)
    options = {"config": model.flix_config, "path": path, "strategy": layer.flix_strategy, "dtype": layer.dtype_policy}  # fmt: skip
    own: Any
    if isinstance(layer, keras.layers.Embedding):
        own = FlixEmbedding(layer.input_dim, layer.output_dim, **options)
    else:
        own = FlixDense(layer.units, use_bias=layer.use_bias, **options)
    given = _given(batch)
    x = given.pop("inputs")
    own(x, **given)
    pairs = [(kernel_of(own), kernel_of(layer)), (own.flix_A, layer.flix_A), (own.flix_B, layer.flix_B)]  # fmt: skip
    if getattr(layer, "bias", None) is not None:
        pairs.append((own.bias, layer.bias))
    for into, value in pairs:
        into.assign(value)
    return _answer(own(x, **given))


def _predicted(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    given = {name: np.asarray(value) for name, value in _given(batch).items()}
    y = model.predict(given, verbose=0)
    return np.asarray(y, np.float64), str(y.dtype)


def _saved(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Keras's own file."""
    with tempfile.TemporaryDirectory() as name:
        model.save(Path(name) / "model.keras")
        return _answer(keras.saving.load_model(Path(name) / "model.keras")(_given(batch)))


def _compiled(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """By XLA."""
    return _answer(tf.function(lambda given: model(given), jit_compile=True)(_given(batch)))


def _inside(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """A function within the routing from around it."""
    run = tf.function(lambda x: model(x))
    with route(model.flix_config.registry, batch.ids, batch.weights):
        return _answer(run(_x(batch)))


def _quantised(model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
    """Over a layer that Keras quantised: what the features add to its output stands on the plain layer's.

    And a model that is made plain with a row's composition gives about what that row gets: inputs are rounded here.
    """
    ((path, layer),) = flix_layers(model.base)
    if batch.dtype != "float32" or batch.ids.ndim > 2 or not len(batch.ids):
        return _answer(model(_given(batch)))
    embeds, x = isinstance(layer, keras.layers.Embedding), _x(batch)
    kernel, bias = kernel_of(layer).numpy(), getattr(layer, "bias", None)
    given = keras.Input(x.shape[1:], dtype="int32" if embeds else "float32")
    own: Any
    if embeds:
        own = keras.layers.Embedding(*kernel.shape, name=path)
    else:
        own = keras.layers.Dense(kernel.shape[1], use_bias=bias is not None, name=path)
    plain = keras.Model(given, own(given))
    own.set_weights([kernel, *([] if bias is None else [bias.numpy()])])
    before = plain(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the input is no layer that can be
        plain.quantize("int8")
    base = plain(x)
    twin = primitives.write(
        adapt(plain, model.flix_config, strategy=layer.flix_strategy), primitives.read(model)
    )
    y = twin(_given(batch))
    for row in range(len(batch.ids)):
        merged = merge(twin, _row(model, batch, row), dequantize=True)(x[row : row + 1])[0]
        off = np.abs(np.asarray(merged - y[row])).max(initial=0)
        assert off <= 0.1 * max(1.0, np.abs(np.asarray(y)).max(initial=0)), "merged otherwise"
    return _answer(before + (y - base))


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


def ways() -> dict[str, Way]:
    """See ``flix_conformance.harness.Harness``."""
    return {
        "copied": _copied,
        "with a flix.Routing": _with_routing,
        "a layer by hand": _by_hand,
        "a layer of its own": _own_layer,
        "predict": _predicted,
        "saved by Keras": _saved,
        "compiled by XLA": _compiled,
        "a function under route": _inside,
        "over a quantised layer": _quantised,
    }


def _adamw(s: AdamW, **options: Any) -> Any:
    return keras.optimizers.AdamW(
        learning_rate=s.lr, beta_1=s.beta1, beta_2=s.beta2, epsilon=s.eps, weight_decay=s.decay, **options
    )  # fmt: skip


def _loss(target: Any, y: Any) -> Any:
    return tf.reduce_sum((y - target) ** 2) / (2 * tf.cast(tf.shape(y)[0], y.dtype))


def _stepped(model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
    """By ``train_on_batch``."""
    model.compile(optimizer=_adamw(settings), loss=_loss)
    for batch in batches:
        model.train_on_batch(_given(batch), batch.target)


def _whole(model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
    """In a compiled step written by hand, on whole tables."""
    optimizer = keep_absent(_adamw(settings), whole=True)
    variables = primitives.parameters(model)
    optimizer.build(variables)

    @tf.function  # type: ignore[untyped-decorator]
    def step(given: Any, target: Any) -> None:
        with tf.GradientTape() as tape:
            loss = _loss(target, model(given, training=True))
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

    for batch in batches:
        step(_given(batch), tf.constant(batch.target))


def _accumulated(model: Any, batches: Sequence[Batch], settings: AdamW) -> None:
    """Gradients of the same batch twice, of which the optimizer takes the mean."""
    model.compile(optimizer=_adamw(settings, gradient_accumulation_steps=2), loss=_loss)
    for batch in batches:
        for _ in range(2):
            model.train_on_batch(_given(batch), batch.target)


def loops() -> dict[str, Callable[..., None]]:
    """See ``flix_conformance.harness.Harness``."""
    return {"train_on_batch": _stepped, "whole tables": _whole, "accumulated": _accumulated}
