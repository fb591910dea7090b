"""Keras's function that rematerialises a layer (``keras.RematScope``), so that it gives the plain gradients.

A rematerialised layer runs twice: in the forward, and again in the backward when the model's call is over and its
routing no longer in force. What is in force at the first run is captured and put in force again for the second.

What: ``keras.src.backend.common.remat.remat``, which Keras looks up in its module at each call; where nothing is in
force it does what it did. If a later Keras has it elsewhere, nothing is wrapped, and the second run raises the error
of a layer without routing instead of giving a silent zero. When: the first model is adapted. Undone: :func:`undo`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras.src.backend.common import remat as rematerialising

from flix.backends.keras.engine import engine
from flix.core.errors import TargetError


def install() -> None:
    """Wrap the function, once."""
    own = getattr(rematerialising, "remat", None)
    if own is None or hasattr(own, "flix_wrapped"):
        return

    def remat(function: Callable[..., Any]) -> Any:
        current = engine.current
        blocks = current.blocks
        if not blocks:
            return own(function)
        if "remat" in engine.REFUSED:
            raise TargetError(engine.REFUSED["remat"])
        # As a tensor of the function that is being traced, from which the function of the backward can take it.
        routing = None if current.routing is None else engine.in_force("a rematerialised layer")

        def call(*args: Any, **kwargs: Any) -> Any:
            # TensorFlow takes no keywords here in graphs, and Keras passes training as one.
            def rerun(*tensors: Any) -> Any:
                held = {"routing": routing, "rerun": engine.frame()}
                with current.resumed(blocks), current.under(**held):
                    return function(*tensors, **kwargs)

            return own(rerun)(*args)

        return call

    remat.flix_wrapped = own  # type: ignore[attr-defined]
    rematerialising.remat = remat


def undo() -> None:
    """Give Keras its own function back."""
    own = getattr(getattr(rematerialising, "remat", None), "flix_wrapped", None)
    if own is not None:
        rematerialising.remat = own
