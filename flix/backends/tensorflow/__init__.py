"""The TensorFlow backend: Keras 3 on TensorFlow (docs/specification.md §5.4).

::

    from flix.backends.tensorflow import adapt
    model = adapt(keras_model, config)
    model.compile(optimizer, loss)
    model.fit({"inputs": x, "flix_features": ids}, y)
"""

from typing import Final

from flix.backends import missing as _missing

try:
    import keras as _keras

    if tuple(map(int, _keras.__version__.split(".")[:2])) < (3, 15):
        raise ImportError(f"Keras {_keras.__version__} is installed, but Keras 3.15 is needed")
except ImportError as _error:
    raise _missing("tensorflow", "TensorFlow and Keras 3", _error) from _error

if _keras.backend.backend() != "tensorflow":
    from flix.core.errors import ConfigError as _ConfigError

    raise _ConfigError(
        "the tensorflow backend needs Keras to run on TensorFlow, but Keras is configured for "
        f"{_keras.backend.backend()!r}; set KERAS_BACKEND=tensorflow before Keras is imported, "
        "or use flix.backends.keras, which also runs on jax and torch"
    )

from flix.backends.keras import primitives
from flix.backends.keras.adapt import FlixModel
from flix.backends.keras.layers import FlixDense, FlixEinsumDense, FlixEmbedding
from flix.backends.keras.optimizers import keep_absent
from flix.backends.tensorflow.routing import route
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

__all__ = [
    "FlixDense", "FlixEinsumDense", "FlixEmbedding", "FlixModel", "Summary", "adapt", "add_feature", "disable", "freeze",
    "import_peft", "keep_absent", "load", "load_features", "load_into", "merge", "named_pairs", "primitives", "push",
    "remove_feature", "rename_feature", "route", "save", "search_weights", "summary", "thaw", "to_adapter", "trainable_parameters",
]  # fmt: skip
