"""Keras's table of classes, by which ``.keras`` files name what they hold.

What: flix's layers and models are entered, in the package ``flix``. When: as their modules are imported. Undone: an
entry is a name and a class, and no other name changes; ``keras.saving.get_custom_objects().pop("flix>FlixDense")``
takes one out.
"""

from __future__ import annotations

import keras

register = keras.saving.register_keras_serializable(package="flix")
