"""What the TensorFlow backend shows the conformance kit (``flix_conformance``): numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from flix.backends.tensorflow.files import load, save
from flix.backends.tensorflow.inspection import trainable_parameters
from flix.backends.tensorflow.lifecycle import (
    add_feature,
    load_features,
    remove_feature,
    rename_feature,
)
from flix.backends.tensorflow.merging import merge
from flix.backends.tensorflow.model import FlixModel, adapt, flix_layers
from flix.backends.tensorflow.optimizers import keep_absent

if TYPE_CHECKING:
    from flix_conformance import AdamW, Batch, Case, Pairs  # type: ignore[import-not-found]


def _plain(case: Case) -> Any:
    """A functional model that is one layer."""
    tokens = case.kind == "embedding"
    lead = (None,) * (case.x.ndim - (1 if tokens else 2))
    given = keras.Input(
        lead if tokens else (*lead, case.d_in), dtype="int32" if tokens else case.dtype
    )
    weights = [case.kernel]
    layer: Any
    if tokens:
        layer = keras.layers.Embedding(case.d_in, case.d_out, dtype=case.dtype, name=case.path)
    else:
        layer = keras.layers.Dense(
            case.d_out, use_bias=case.bias is not None, dtype=case.dtype, name=case.path
        )
        weights += [] if case.bias is None else [case.bias]
    model = keras.Model(given, layer(given))
    layer.set_weights(weights)
    return model


def _layer(model: FlixModel) -> Any:
    return next(layer for _, layer in flix_layers(model.base))


def _model(case: Case) -> FlixModel:
    if case.model is not None:
        return case.model  # type: ignore[no-any-return]
    model = adapt(_plain(case), case.config, strategy=case.strategy)
    _layer(model).set_pairs(
        {f: pair[0] for f, pair in case.pairs.items()},
        {f: pair[1] for f, pair in case.pairs.items()},
    )
    return model


def _pairs(model: FlixModel) -> Pairs:
    return {feature: (a, b) for feature, a, b in _layer(model).pairs()}


def _x(case: Case, values: NDArray[Any]) -> Any:
    return tf.constant(values, tf.int32 if case.kind == "embedding" else case.dtype)


def _inputs(x: Any, ids: Any, weights: Any) -> dict[str, Any]:
    inputs = {"inputs": x, "flix_features": ids}
    return inputs if weights is None else {**inputs, "flix_weights": weights}


def _numpy(values: Any) -> NDArray[Any]:
    return np.asarray(tf.cast(values, tf.float64))


def _kernel(layer: Any, kind: str) -> Any:
    return layer._embeddings if kind == "embedding" else layer._kernel


class TensorFlowHarness:
    """See ``flix_conformance.harness.Harness``."""

    dtypes = ("float32", "bfloat16", "float64")
    strategies = ("auto", "gather", "masked", "single", "fused")
    kinds = ("linear", "embedding")

    def forward(self, case: Case) -> tuple[NDArray[Any], str]:
        y = _model(case)(_inputs(_x(case, case.x), case.ids, case.weights))
        return _numpy(y), tf.as_dtype(y.dtype).name

    def gradients(self, case: Case, dy: NDArray[Any]) -> dict[str, Any]:
        model = _model(case)
        layer = _layer(model)
        x = _x(case, case.x)
        weights = None if case.weights is None else tf.constant(case.weights)
        kernel = _kernel(layer, case.kind)
        base = [kernel] if any(v is kernel for v in trainable_parameters(model)) else []
        tables = [] if layer.flix_A is None else [layer.flix_A, layer.flix_B]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([v.value for v in (*tables, *base)])
            tape.watch([t for t in (x, weights) if t is not None and t.dtype.is_floating])
            y = model(_inputs(x, case.ids, weights), training=True)
        wanted = [x, weights, *(v.value for v in (*tables, *base))]
        found = tape.gradient(
            y,
            [t for t in wanted if t is not None],
            output_gradients=tf.constant(dy, y.dtype),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        values = iter(found)
        dx = next(values)
        d_weights = None if weights is None else next(values)
        dense = [_numpy(tf.convert_to_tensor(value)) for value in values]
        return {
            "x": None if case.kind == "embedding" else _numpy(dx),
            "weights": None if d_weights is None else _numpy(d_weights),
            "pairs": _cut(layer, dense) if tables else {},
            "base": dense[-1] if base else None,
        }

    def train(self, case: Case, batches: Sequence[Batch], optimizer: AdamW) -> dict[str, Any]:
        model = _model(case)
        adamw = keep_absent(
            keras.optimizers.AdamW(
                learning_rate=optimizer.lr,
                beta_1=optimizer.beta1,
                beta_2=optimizer.beta2,
                epsilon=optimizer.eps,
                weight_decay=optimizer.decay,
            )
        )
        variables = trainable_parameters(model)
        adamw.build(variables)
        trajectory = []
        for batch in batches:
            with tf.GradientTape() as tape:
                y = model(_inputs(_x(case, batch.x), batch.ids, batch.weights), training=True)
                loss = tf.reduce_sum((y - batch.target) ** 2) / (2 * len(batch.x))
            adamw.apply(tape.gradient(loss, [v.value for v in variables]), variables)
            trajectory.append(_pairs(model))
        return {"pairs": trajectory, "base": _kernel(_layer(model), case.kind).numpy()}

    def merge(self, case: Case, row: Mapping[str, Any]) -> NDArray[Any]:
        layer = merge(_model(case), row).get_layer(case.path)
        return _numpy(_kernel(layer, case.kind).value)

    def initial(self, case: Case) -> Pairs:
        return _pairs(adapt(_plain(case), case.config))

    def save(self, case: Case, folder: Path) -> None:
        save(_model(case), folder)

    def load(self, case: Case, folder: Path) -> Pairs:
        return _pairs(load(_plain(case), folder))

    def adapted(self, case: Case) -> FlixModel:
        return _model(case)

    def state(self, model: Any) -> tuple[dict[tuple[str, str], int], Pairs]:
        registry = model.flix_config.registry
        return {f: registry.id(*f) for f in registry.live}, _pairs(model)

    def add_feature(
        self, model: FlixModel, group: str, name: str, rank: int, init_from: Sequence[str]
    ) -> None:
        add_feature(model, group, name, rank, init_from=init_from)

    def remove_feature(self, model: FlixModel, group: str, name: str) -> None:
        remove_feature(model, group, name)

    def rename_feature(self, model: FlixModel, group: str, name: str, new: str) -> None:
        rename_feature(model, group, name, new)

    def save_features(
        self, model: FlixModel, folder: Path, features: Sequence[tuple[str, str]]
    ) -> None:
        save(model, folder, features)

    def load_features(self, model: FlixModel, folder: Path) -> None:
        load_features(model, folder)


def _cut(layer: Any, tables: list[NDArray[Any]]) -> Pairs:
    """Gradients of the whole tables as those of each feature."""
    a, b = tables[:2]
    return {
        feature: (a[rows], b[rows].T)
        for i, feature in enumerate(layer.flix_config.registry.features)
        if layer.flix_layout.ranks[i]
        for rows in [layer._span(i)]
    }


def harness() -> TensorFlowHarness:
    """The harness."""
    return TensorFlowHarness()
