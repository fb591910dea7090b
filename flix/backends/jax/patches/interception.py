"""Patch of qwix's: the products inside a quantised model's call, which it takes over; features' sums are left alone.

What: qwix replaces JAX's products on a thread while a model of its own runs. What it takes for a layer's weight it
quantises, a table of pairs, too; so while features are summed, its interceptions are off on that thread.
When: in each adapted layer's call, where qwix is imported and intercepts. Undone: as the sum is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from flix.core.errors import TargetError

_MODULE = "qwix._src.interception"


def free(call: Callable[..., Any], *args: Any) -> Any:
    """``call(*args)``, without interceptions.

    Raises:
        TargetError: a version of qwix whose interceptions cannot be switched off.
    """
    if "qwix" not in sys.modules:
        return call(*args)
    manager: Any = getattr(sys.modules.get(_MODULE), "interception_manager", None)
    if not hasattr(manager, "disable_interception"):
        raise TargetError(
            "this version of qwix does not let its interceptions be switched off, so that it would quantise features; "
            "0.1.8 does"
        )
    held = manager.disable_interception()
    try:
        return call(*args)
    finally:
        manager.enable_interception(held)
