"""What an adapted model is called with: the base's inputs, and routing beside them."""

from __future__ import annotations

from typing import Any

INPUTS, FEATURES, WEIGHTS = "inputs", "flix_features", "flix_weights"
CALL = 'model({"inputs": x, "flix_features": ids})'
"""How an adapted model is called; for messages."""


def split_inputs(inputs: Any, base: Any) -> tuple[Any, Any, Any]:
    """(the base's own inputs, features or None, weights or None)."""
    if not isinstance(inputs, dict):
        return inputs, None, None
    own = {k: v for k, v in inputs.items() if k not in (FEATURES, WEIGHTS)}
    if set(own) == {INPUTS} and not isinstance(symbolic_inputs(base), dict):
        own = own[INPUTS]
    return own, inputs.get(FEATURES), inputs.get(WEIGHTS)


def symbolic_inputs(base: Any) -> Any:
    """The inputs of a functional or sequential model as it was built from them; None of a subclassed one."""
    return getattr(getattr(base, "_functional", None) or base, "_inputs_struct", None)
