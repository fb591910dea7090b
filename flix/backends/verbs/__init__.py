"""What users do with a model, in every framework (docs/specification.md §5.1.6), written once.

A backend's module makes its verbs of its primitives::

    from flix.backends.verbs import Verbs

    verbs = Verbs(primitives)
    adapt, save, load = verbs.adapt, verbs.save, verbs.load

A verb that changes a model returns it (docs/specification.md §5.1.7). That is the same model if the framework changes
models in place, a new ``(config, bank)`` for JAX's banks, and the model around it if a plain Keras model is adapted.
"""

from __future__ import annotations

from flix.backends.verbs.features import Features
from flix.backends.verbs.merging import Merging
from flix.backends.verbs.models import Models
from flix.backends.verbs.searching import Searching


class Verbs(Models, Features, Merging, Searching):
    """The verbs over one backend's primitives."""


__all__ = ["Verbs"]
