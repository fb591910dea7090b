"""The conformance kit of flix: one specification, any number of backends.

Run it with pytest; it finds backends by entry point (group ``flix.backends``)::

    pytest --pyargs flix_conformance --flix-backend torch

A backend takes part by its primitives and verbs, and by a :class:`Harness` for what they cannot do: five methods, numpy
in and numpy out. See :mod:`flix_conformance.harness`.
"""

from flix_conformance.backend import Backend
from flix_conformance.harness import AdamW, Batch, Case, Experts, Harness, Layer, Pairs

try:
    from flix_conformance._built import version as __version__  # the build writes it from the tag
except ImportError:
    __version__ = "0.1.dev0"

__all__ = [
    "AdamW",
    "Backend",
    "Batch",
    "Case",
    "Experts",
    "Harness",
    "Layer",
    "Pairs",
    "__version__",
]
