"""The threads on which a distribution strategy runs replicas, so that they run under what the caller has in force.

``strategy.run`` is one call for whoever makes it, but context variables do not reach the threads that it starts.

What: ``run`` of TensorFlow's thread class, and a copy of the context in each thread. If a later TensorFlow has no such
class, nothing is wrapped, and a function that is called inside ``disable`` is refused there. When: the first model is
adapted. Undone: :func:`undo`.
"""

from __future__ import annotations

import contextvars
from typing import Any

from tensorflow.python.distribute import mirrored_run

_class = getattr(mirrored_run, "_MirroredReplicaThread", None)


def install() -> None:
    """Wrap the class's methods, once."""
    if _class is None or hasattr(_class, "flix_wrapped"):
        return
    own = _class.flix_wrapped = (_class.__init__, _class.run)

    def init(thread: Any, *args: Any, **kwargs: Any) -> None:
        own[0](thread, *args, **kwargs)
        thread.flix_context = contextvars.copy_context()

    def run(thread: Any) -> None:
        thread.flix_context.run(own[1], thread)

    _class.__init__, _class.run = init, run


def undo() -> None:
    """Give the class its own methods back."""
    if _class is not None and hasattr(_class, "flix_wrapped"):
        _class.__init__, _class.run = _class.flix_wrapped
        del _class.flix_wrapped
