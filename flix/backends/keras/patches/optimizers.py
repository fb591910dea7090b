"""The methods of Keras optimizers.

What: ``build`` and ``apply`` of Keras's class of all optimizers, which put :func:`keep_absent` on one that is to train
tables of features: in a model around an adapted one, or in a loop written by hand. When: this backend is imported.
Undone: :func:`undo`.

What: ``build``, ``apply``, ``update_step`` and others of an optimizer (``RowOptimizer.METHODS``), as attributes of the
object; its class stays as it is. Of a ``MultiOptimizer``, which makes the optimizers inside as it is built, ``build``
alone. When: ``keep_absent`` is called, by hand or as an adapted model is compiled. Undone: :func:`take_off`; the
counts of steps, which are the optimizer's state by then, stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras.src.optimizers.base_optimizer import BaseOptimizer


def put_on(optimizer: Any, rows: Any) -> None:
    """Let an object's methods stand in for an optimizer's own."""
    optimizer.flix_rows = rows
    for name in rows.METHODS:
        setattr(optimizer, name, getattr(rows, name))


def take_off(optimizer: Any) -> None:
    """Give an optimizer its own methods back."""
    rows = vars(optimizer).pop("flix_rows", None)
    for name in () if rows is None else rows.METHODS:
        vars(optimizer).pop(name, None)


def reach_inside(optimizer: Any, visit: Callable[[Any], Any]) -> None:
    """Visit the optimizers inside of a MultiOptimizer, once it has them."""
    own = type(optimizer).build

    def build(variables: Any) -> None:
        own(optimizer, variables)
        for inner in optimizer.optimizers:
            visit(inner)

    if optimizer.built:
        for inner in optimizer.optimizers:
            visit(inner)
    else:
        optimizer.build = build


def install(keep: Callable[[Any, Any], None]) -> None:
    """Wrap the class's methods, once; ``keep`` is called with an optimizer and the variables that it was built for."""
    if hasattr(BaseOptimizer, "flix_wrapped"):
        return
    own = BaseOptimizer.flix_wrapped = (BaseOptimizer.build, BaseOptimizer.apply)

    def build(optimizer: Any, variables: Any) -> None:
        own[0](optimizer, variables)
        if not hasattr(optimizer, "flix_rows"):
            keep(optimizer, variables)

    def apply(optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
        if trainable_variables is not None and not optimizer.built:
            trainable_variables = list(trainable_variables)
            optimizer.build(trainable_variables)
            if hasattr(optimizer, "flix_rows"):  # since then: its apply is another now
                optimizer.apply(grads, trainable_variables)
                return
        own[1](optimizer, grads, trainable_variables)

    BaseOptimizer.build, BaseOptimizer.apply = build, apply


def undo() -> None:
    """Give Keras's class its own methods back."""
    if hasattr(BaseOptimizer, "flix_wrapped"):
        BaseOptimizer.build, BaseOptimizer.apply = BaseOptimizer.flix_wrapped
        del BaseOptimizer.flix_wrapped
