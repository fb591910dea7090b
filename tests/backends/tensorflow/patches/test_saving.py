"""Classes go by their names in files."""

import keras

from flix.backends.tensorflow import FlixDense, FlixEinsumDense, FlixEmbedding, FlixModel


def test_classes_are_entered_under_flix():
    for cls in (FlixDense, FlixEinsumDense, FlixEmbedding, FlixModel):
        assert keras.saving.get_registered_object(f"flix>{cls.__name__}") is cls
