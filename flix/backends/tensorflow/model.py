"""What an adapted model has where Keras runs on TensorFlow, beyond what it has everywhere."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from flix.backends.keras.inputs import FEATURES, INPUTS, WEIGHTS, symbolic_inputs
from flix.backends.tensorflow.inputs import spec
from flix.backends.tensorflow.patches import replicas
from flix.backends.tensorflow.patches.captures import traced_function
from flix.backends.tensorflow.patches.saving import Children
from flix.backends.tensorflow.routing import current
from flix.core.errors import TargetError


def install(base: Any, state: Any) -> None:
    """Patch what this engine needs patched, once and for a base that is being adapted."""
    replicas.install()
    vars(base)["_trackable_children"] = Children(base, state, current)


def compiled(asked: Any) -> bool:
    """Whether ``compile(jit_compile=...)`` compiles by XLA: only if it is asked for."""
    return False if asked == "auto" else bool(asked)


def switch(state: Any, by: int) -> None:
    """Open a ``disable`` block (1), or close the last one (-1)."""
    current.switch(state, by, graph=traced_function())


class Extras:
    """Mixed into the adapted model: replicas, and SavedModels with routing in the signature."""

    base: Any
    flix_state: Any

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Keras's hook. Under a distribution strategy it gets the mean of the replicas' batches, so floats for ids."""

        if data_batch is not None:
            pairs = keras.tree.flatten_with_path(data_batch)
            flat = [tf.cast(x, tf.int32) if FEATURES in path else x for path, x in pairs]
            data_batch = keras.tree.pack_sequence_as(data_batch, flat)
        super()._symbolic_build(iterator=iterator, data_batch=data_batch)  # type: ignore[misc]

    def export(self, *args: Any, input_signature: Any = None, **kwargs: Any) -> Any:
        """keras.Model.export; the default serving signature takes ``flix_features`` beside the base's inputs.

        Raises:
            TargetError: a base that is neither functional nor has been called, so that its inputs are not known.
        """
        signature = [self.input_specs()] if input_signature is None else input_signature
        return super().export(*args, input_signature=signature, **kwargs)  # type: ignore[misc]

    def input_specs(self, weights: bool = False) -> dict[str, Any]:
        """What the model is called with, as ``tf.TensorSpec``: batches and widths of any size.

        Args:
            weights: with ``flix_weights``.

        Raises:
            TargetError: a base that is neither functional nor has been called.
        """
        struct = symbolic_inputs(self.base)
        own = self.flix_state.specs if struct is None else keras.tree.map_structure(spec, struct)
        if own is None:
            raise TargetError(
                "the inputs of a subclassed model are known once it was called; call it on a batch, or "
                "give export an input_signature"
            )
        given = dict(own) if isinstance(own, dict) else {INPUTS: own}
        given[FEATURES] = tf.TensorSpec([None, None], tf.int32, name=FEATURES)
        if weights:
            given[WEIGHTS] = tf.TensorSpec([None, None], tf.float32, name=WEIGHTS)
        return given
