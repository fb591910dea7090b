"""Keras 3 on JAX, torch or TensorFlow: adapted layers written with ``keras.ops`` (docs/specification.md §5.4)::

    from flix.backends.keras import adapt            # under KERAS_BACKEND=jax, torch or tensorflow
    model = adapt(keras_model, config)
    model.compile(optimizer, loss)
    model.fit({"inputs": x, "flix_features": ids}, y)

If Keras runs on TensorFlow, this is :mod:`flix.backends.tensorflow`.
"""

from importlib import import_module as _import
from typing import Final

from flix.backends import missing as _missing

try:
    import keras as _keras

    if tuple(map(int, _keras.__version__.split(".")[:2])) < (3, 15):
        raise ImportError(f"Keras {_keras.__version__} is installed, but Keras 3.15 is needed")
except ImportError as _error:
    raise _missing("tensorflow", "Keras 3", _error) from _error

if _keras.backend.backend() == "tensorflow":
    _import("flix.backends.tensorflow")  # what carries it out there, before what asks for that
from flix.backends.keras import primitives
from flix.backends.keras.adapt import FlixModel
from flix.backends.keras.engine import engine as _engine
from flix.backends.keras.layers import FlixDense, FlixEinsumDense, FlixEmbedding
from flix.backends.keras.optimizers import keep_absent
from flix.backends.verbs import Verbs
from flix.core.adapter.summary import Summary

verbs: Final = Verbs(primitives)
adapt: Final = verbs.adapt
trainable_parameters: Final = verbs.trainable_parameters
summary: Final = verbs.summary
add_feature: Final = verbs.add_feature
remove_feature: Final = verbs.remove_feature
rename_feature: Final = verbs.rename_feature
load_features: Final = verbs.load_features
import_peft: Final = verbs.import_peft
to_adapter: Final = verbs.to_adapter
named_pairs: Final = verbs.named_pairs
save: Final = verbs.save
load: Final = verbs.load
load_into: Final = verbs.load_into
push: Final = verbs.push
freeze: Final = verbs.freeze
thaw: Final = verbs.thaw
disable: Final = verbs.disable
merge: Final = verbs.merge
search_weights: Final = verbs.search_weights
route: Final = _engine.route

__all__ = [
    "FlixDense", "FlixEinsumDense", "FlixEmbedding", "FlixModel", "Summary", "adapt", "add_feature", "disable", "freeze",
    "import_peft", "keep_absent", "load", "load_features", "load_into", "merge", "named_pairs", "primitives", "push",
    "remove_feature", "rename_feature", "route", "save", "search_weights", "summary", "thaw", "to_adapter", "trainable_parameters",
]  # fmt: skip
