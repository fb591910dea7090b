"""What the conformance kit runs of this backend beside its verbs: see ``flix_conformance.harness.Harness``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.framework import op_callbacks

from flix.backends.keras.adapt import FlixModel
from flix.backends.keras.parameters import kernel_of
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import keep_absent, primitives, search_weights, ways

if TYPE_CHECKING:
    from flix_conformance.harness import AdamW, Batch, Layer  # type: ignore[import-not-found]


def _x(batch: Batch) -> Any:
    return tf.constant(batch.x, tf.int32 if batch.x.dtype.kind in "iu" else batch.dtype)


def _called(model: Any, x: Any, batch: Batch, weights: Any, **options: Any) -> Any:
    routing = {"flix_features": batch.ids, "flix_weights": weights}
    given = {name: value for name, value in routing.items() if value is not None}
    return model({"inputs": x, **given} if given else x, **options)


def _numpy(values: Any) -> NDArray[Any]:
    return np.asarray(tf.cast(values, tf.float64))


def _layer(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = (model.base if isinstance(model, FlixModel) else model).get_layer(name)
    return model


def _nested(layers: Sequence[Layer], given: Any, name: str | None = None) -> Any:
    """A functional model; what stands before a path's first dot is a model of its own."""
    y = given
    for head, group in groupby(layers, lambda layer: layer.path.partition(".")[0]):
        inner = [replace(layer, path=layer.path.partition(".")[2]) for layer in group]
        if inner[0].path:
            y = _nested(inner, keras.Input(y.shape[1:], dtype=y.dtype), head)(y)
        else:
            y = _plain(inner[0], head, y)
    return keras.Model(given, y, **({} if name is None else {"name": name}))


def _plain(layer: Layer, name: str, x: Any) -> Any:
    """A layer's output; one of a form of several axes stands between two layers that shape its input and output."""
    options = {"dtype": layer.dtype, "name": name}
    d_in, d_out = map(int, layer.kernel.shape)
    kernel: Any
    bias: Any
    kernel, bias = layer.kernel, layer.bias
    if layer.kind == "embedding":
        made = keras.layers.Embedding(d_in, d_out, **options)
    elif not layer.form:
        made = keras.layers.Dense(d_out, use_bias=layer.bias is not None, **options)
    elif layer.form == "heads":  # kernel [out, in, out]
        shape = (None, 2, d_out // 2)
        made = keras.layers.EinsumDense(_EINSUMS["heads"], shape, bias_axes="nh", **options)
        kernel, bias = kernel.reshape(d_in, 2, d_out // 2).swapaxes(0, 1), bias.reshape(2, -1)
    else:  # [out, in, in]
        x = keras.layers.Reshape((-1, 2, d_in // 2))(x)
        made = keras.layers.EinsumDense(_EINSUMS["out"], (None, d_out), bias_axes="d", **options)
        kernel = kernel.T.reshape(d_out, 2, d_in // 2)
    y = made(x)
    made.set_weights([value for value in (kernel, bias) if value is not None])
    return keras.layers.Reshape((-1, d_out))(y) if layer.form == "heads" else y


_EINSUMS = {"heads": "btd,ndh->btnh", "out": "btnh,dnh->btd"}


def _adamw(settings: AdamW) -> Any:
    return keep_absent(
        keras.optimizers.AdamW(
            learning_rate=settings.lr,
            beta_1=settings.beta1,
            beta_2=settings.beta2,
            epsilon=settings.eps,
            weight_decay=settings.decay,
        )
    )


def _loss(target: Any, y: Any) -> Any:
    return tf.reduce_sum((y - target) ** 2) / (2 * tf.cast(tf.shape(y)[0], y.dtype))


class TensorFlowHarness:
    """Plain models, calls, gradients and training: numpy in, numpy out."""

    dtypes = ("float32", "bfloat16", "float64")
    strategies = ("auto", "gather", "masked", "single", "fused")
    kinds = ("linear", "embedding")
    nested = True
    forms = ("heads", "out")
    id_dtypes = ("int32", "int64", "int16", "int8", "uint8")

    def plain(self, layers: Sequence[Layer], x: NDArray[Any]) -> Any:
        """A functional model."""
        first = layers[0]
        tokens = first.kind == "embedding"
        shape = (None,) * (x.ndim - 1) if tokens else (*[None] * (x.ndim - 2), len(first.kernel))
        return _nested(layers, keras.Input(shape, dtype="int32" if tokens else first.dtype))

    def call(self, model: Any, batch: Batch, path: str | None = None) -> tuple[NDArray[Any], str]:
        """In eager mode."""
        if path is None:
            y = _called(model, _x(batch), batch, batch.weights, training=True)
        else:
            layer = _layer(model, path)
            y = layer(_x(batch), flix_features=batch.ids, flix_weights=batch.weights)
        return _numpy(y), tf.as_dtype(y.dtype).name

    def evaluated(self, model: Any, batch: Batch) -> tuple[NDArray[Any], str]:
        y = _called(model, _x(batch), batch, batch.weights, training=False)
        return _numpy(y), tf.as_dtype(y.dtype).name

    def gradients(self, model: FlixModel, batch: Batch, dy: NDArray[Any]) -> Mapping[str, Any]:
        """By a tape."""
        ((_, layer),) = flix_layers(model.base)
        x = _x(batch)
        weights = None if batch.weights is None else tf.constant(batch.weights)
        wanted = {
            "x": x if x.dtype.is_floating else None,
            "weights": weights,
            "A": None if layer.flix_A is None else layer.flix_A.value,
            "B": None if layer.flix_B is None else layer.flix_B.value,
            "base": kernel_of(layer).value if kernel_of(layer).trainable else None,
        }
        asked = {name: value for name, value in wanted.items() if value is not None}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(list(asked.values()))
            y = _called(model, x, batch, weights, training=True)
        found = tape.gradient(
            y,
            asked,
            output_gradients=tf.constant(dy, y.dtype),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        dense = {name: _numpy(tf.convert_to_tensor(value)) for name, value in found.items()}
        features = model.flix_config.registry.features
        pairs = {
            features[i]: (dense["A"][layer.span(i)], dense["B"][layer.span(i)].T)
            for i, rank in enumerate(layer.flix_layout.ranks)
            if rank
        }
        return {name: dense.get(name) for name in ("x", "weights", "base")} | {"pairs": pairs}

    def trainer(self, model: FlixModel, settings: AdamW) -> Callable[[Batch], Any]:
        """Steps of Keras's AdamW."""
        optimizer = _adamw(settings)
        variables = primitives.parameters(model)
        optimizer.build(variables)

        def step(batch: Batch) -> None:
            with tf.GradientTape() as tape:
                y = _called(model, _x(batch), batch, batch.weights, training=True)
                loss = _loss(batch.target, y)
            optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)

        return step

    def compiled_forward(self, model: FlixModel) -> Callable[[Batch], tuple[NDArray[Any], str]]:
        """One graph for all calls: routing is an argument."""

        run = tf.function(lambda given: model(given))

        def called(batch: Batch) -> tuple[NDArray[Any], str]:
            given = {"inputs": _x(batch), "flix_features": tf.constant(batch.ids)}
            if batch.weights is not None:
                given["flix_weights"] = tf.constant(batch.weights)
            y = run(given)
            return _numpy(y), tf.as_dtype(y.dtype).name

        return called

    def fit(self, model: FlixModel, batches: Sequence[Batch], settings: AdamW) -> None:
        """By Keras's ``fit``."""
        given = {
            "inputs": np.concatenate([b.x for b in batches]),
            "flix_features": np.concatenate([b.ids for b in batches]),
        }
        weights = [b.weights for b in batches if b.weights is not None]
        if weights:
            given["flix_weights"] = np.concatenate(weights)
        target = np.concatenate([b.target for b in batches])
        model.compile(optimizer=_adamw(settings), loss=_loss)
        model.fit(given, target, batch_size=len(batches[0].x), shuffle=False, verbose=0)

    def largest(self, model: FlixModel, batch: Batch, dy: NDArray[Any]) -> int:
        """Of the arrays that operations make, one after another, those of compiled functions included."""
        sizes = [0]

        def seen(kind: Any, given: Any, attributes: Any, outputs: Any, name: Any = None) -> None:
            del kind, given, attributes, name
            sizes.extend((y.shape.num_elements() or 0) * y.dtype.size for y in outputs)

        op_callbacks.add_op_callback(seen)
        tf.config.run_functions_eagerly(True)
        try:
            self.gradients(model, batch, dy)
        finally:
            tf.config.run_functions_eagerly(False)
            op_callbacks.remove_op_callback(seen)
        return max(sizes)

    def ways(self) -> dict[str, Any]:
        return ways.ways()

    def loops(self) -> dict[str, Any]:
        return ways.loops()

    def kernel(self, model: Any, path: str) -> NDArray[Any]:
        """Of a plain or adapted model."""
        layer = _layer(model, path)
        kernel = _numpy(kernel_of(layer).value)
        if not isinstance(layer, keras.layers.EinsumDense):
            return kernel
        if layer.equation == _EINSUMS["heads"]:
            return kernel.swapaxes(0, 1).reshape(kernel.shape[1], -1)
        return kernel.reshape(len(kernel), -1).T

    def search(self, model: FlixModel, batch: Batch, row: Any, **options: Any) -> Any:
        def loss(y: Any, _: Any) -> Any:
            return _loss(batch.target, y)

        return search_weights(model, {"inputs": _x(batch)}, row, loss=loss, **options)

    def unfreeze(self, model: FlixModel, path: str) -> None:
        """As a user does with a head."""
        _layer(model, path).trainable = True


harness = TensorFlowHarness
