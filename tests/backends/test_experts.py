"""Adapters whose layers have an axis of experts, in the backends that have no such layers."""

from __future__ import annotations

import numpy as np
import pytest

import flix
from flix import AdapterError, TargetError
from flix.core.adapter.adapter import Adapter, LayerShape, expected_tensors
from tests.helpers.registry import config

EXPERTS = "mlp.experts.down_proj"


def made(path: str = EXPERTS) -> Adapter:
    layers = {path: LayerShape(4, 6, experts=3, active=2)}
    shapes = expected_tensors(config(), layers)
    return Adapter(config(), layers, {name: np.ones(shape, np.float32) for name, shape in shapes})


def test_jaxs_banks_refuse_them_by_name():
    pytest.importorskip("jax")
    from flix.backends import jax

    with pytest.raises(TargetError, match=rf"'{EXPERTS}': the kernels have an axis of"):
        jax.init(config(), made().layers)
    bank = jax.init(config(), {"q": (6, 5)})
    with pytest.raises(TargetError, match="axis of experts"):
        jax.load_features((config(), bank), made())


def test_models_of_jax_refuse_them_by_name(tmp_path):
    pytest.importorskip("jax")
    from flax import nnx

    from flix.backends.jax import load

    flix.save_adapter(made("q"), tmp_path)

    class Net(nnx.Module):
        def __init__(self):
            self.q = nnx.Linear(4, 6, rngs=nnx.Rngs(0))

    with pytest.raises(AdapterError, match=r"'q' is .*3 experts"):
        load(Net(), tmp_path)


def test_keras_models_refuse_them_by_name(tmp_path):
    keras = pytest.importorskip("keras")
    pytest.importorskip("tensorflow")
    from flix.backends.tensorflow import load

    flix.save_adapter(made("q"), tmp_path)
    inputs = keras.Input((4,))
    with pytest.raises(AdapterError, match=r"'q' is .*3 experts"):
        load(keras.Model(inputs, keras.layers.Dense(6, name="q")(inputs)), tmp_path)
