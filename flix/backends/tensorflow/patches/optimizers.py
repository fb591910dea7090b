"""The methods of one Keras optimizer.

What: ``build``, ``apply``, ``update_step`` and ``_use_weight_decay`` of an optimizer, as attributes of the object; its
class stays as it is. Of a ``MultiOptimizer``, which makes the optimizers inside as it is built, ``build`` alone. When:
``keep_absent`` is called, by hand or as an adapted model is compiled. Undone: :func:`take_off`; the counts of steps,
which are the optimizer's state by then, stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

METHODS = ("build", "apply", "update_step", "_use_weight_decay")


def put_on(optimizer: Any, rows: Any) -> None:
    """Let an object's methods stand in for an optimizer's own."""
    optimizer.flix_rows = rows
    for name in METHODS:
        setattr(optimizer, name, getattr(rows, name))


def take_off(optimizer: Any) -> None:
    """Give an optimizer its own methods back."""
    for name in (*METHODS, "flix_rows"):
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
