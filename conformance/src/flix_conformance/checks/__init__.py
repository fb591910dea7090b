"""The checks, in the order of the report."""

from flix_conformance.checks import (
    conduct,
    cross,
    exchange,
    experts,
    files,
    gradients,
    inputs,
    isolation,
    laws,
    layers,
    lifecycle,
    lives,
    loading,
    outputs,
    runs,
    search,
    sizes,
    training,
    uses,
)
from flix_conformance.checks._registry import CHECKS, Check, NotOffered

_MODULES = (
    outputs,
    gradients,
    laws,
    inputs,
    isolation,
    sizes,
    layers,
    experts,
    training,
    uses,
    files,
    lifecycle,
    runs,
    loading,
    exchange,
    conduct,
    lives,
    search,
    cross,
)
_ORDER = [module.__name__ for module in _MODULES]
for _check in sorted(CHECKS.values(), key=lambda c: _ORDER.index(c.run.__module__)):
    CHECKS[_check.name] = CHECKS.pop(_check.name)

__all__ = ["CHECKS", "Check", "NotOffered"]
