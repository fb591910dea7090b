"""Layers change their class in place, and have their own one back where it is asked for."""

import keras
import pytest

import flix
from flix.backends.keras.patches.classes import become, plain
from flix.backends.keras.paths import flix_layers
from flix.backends.tensorflow import FlixDense
from tests.helpers.tensorflow import adapted


def test_adapted_layers_are_plain_inside():
    model, _ = adapted("sequential")
    layers = [layer for _, layer in flix_layers(model.base)]
    with plain(layers):
        assert {type(layer) for layer in layers} == {keras.layers.Dense}
        assert "config" not in layers[0].get_config()
    assert {type(layer) for layer in layers} == {FlixDense}
    with pytest.raises(ValueError, match="stop"), plain(layers):
        raise ValueError("stop")
    assert {type(layer) for layer in layers} == {FlixDense}


def test_a_layer_that_cannot_become_adapted_is_named():
    with pytest.raises(flix.TargetError, match=r"layer 'a\.b' cannot be adapted: it is not built"):
        become(keras.layers.Dense(3), "a.b")
