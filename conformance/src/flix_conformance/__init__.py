"""The conformance kit of flix: one specification, any number of backends.

Run it with pytest; it finds backends by entry point (group ``flix.backends``)::

    pytest --pyargs flix_conformance --flix-backend torch

A backend takes part by a :class:`Harness`: nine methods, numpy in and numpy out, and by the methods of
:class:`Lifecycle` where features can join and leave. See :mod:`flix_conformance.harness`.
"""

from flix_conformance.harness import AdamW, Backend, Batch, Case, Harness, Lifecycle, Pairs

__all__ = ["AdamW", "Backend", "Batch", "Case", "Harness", "Lifecycle", "Pairs"]
__version__ = "0.1.0"
