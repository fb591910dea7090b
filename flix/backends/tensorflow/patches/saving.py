"""How TensorFlow saves: SavedModels of a base.

What: a base's list of what a SavedModel has of it, without the signature that would call the base by itself. When: it
is adapted. Undone: ``del vars(base)["_trackable_children"]``.
"""

from __future__ import annotations

import copy
from typing import Any

from flix.backends.forward import Forward


class Children:
    """What a SavedModel has of the base of an adapted model; called as Keras's method that it stands in for."""

    def __init__(self, base: Any, state: Any, current: Forward) -> None:
        self.base, self.state, self.current = base, state, current

    def __call__(self, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        self.current.switch(self.state, 1, graph=None)  # Keras traces the signature while it lists
        try:
            found = type(self.base)._trackable_children(self.base, save_type, **kwargs)
        finally:
            self.current.switch(self.state, -1)
        found.pop("_default_save_signature", None)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Children:
        return Children(
            copy.deepcopy(self.base, memo), copy.deepcopy(self.state, memo), self.current
        )
