"""Backends by name. They are found by entry point (group ``flix.backends``) and imported on demand.

An entry point names the backend's module, whose ``primitives`` are the seam (:mod:`flix.backends.protocol`).
"""

from __future__ import annotations

import importlib
from types import ModuleType

from flix.core.errors import FlixError, MissingFrameworkError, listed, near

GROUP = "flix.backends"

# flix's own, so that they are found from a source tree too: the module, and the framework it needs.
_OWN = {
    "torch": ("flix.backends.torch", "torch"),
    "jax": ("flix.backends.jax", "jax"),
    "tensorflow": ("flix.backends.tensorflow", "tensorflow"),
}


class UnknownBackendError(FlixError, KeyError):
    """No backend of this name is registered."""

    def __str__(self) -> str:
        return str(self.args[0])


class IncompleteBackendError(FlixError, TypeError):
    """A backend lacks primitives that every backend gives."""


def _modules() -> dict[str, str]:
    from importlib.metadata import entry_points

    found = {name: module for name, (module, _) in _OWN.items()}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, entry.value)
    return found


def available() -> dict[str, bool]:
    """The registered backends, and whether each one's framework is installed. Imports none of them."""
    return {name: _installed(_OWN[name][1]) if name in _OWN else True for name in _modules()}


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False  # something on the import path refuses it


def get(name: str) -> ModuleType:
    """The module of a backend, imported and checked.

    Raises:
        UnknownBackendError: no backend of this name is registered.
        MissingFrameworkError: its framework is not installed; the message says what to install.
        IncompleteBackendError: it lacks primitives; they are named.
    """
    modules = _modules()
    if name not in modules:
        raise UnknownBackendError(
            f"no backend {name!r}{near(name, modules)}; registered: {listed(modules)}"
        )
    module = importlib.import_module(modules[name])
    check(module, name)
    return module


def check(module: ModuleType, name: str) -> None:
    """Hold a backend's module to :class:`flix.backends.protocol.Backend`.

    Raises:
        IncompleteBackendError: it has no ``primitives``, or they lack some; they are named.
    """
    from flix.backends.protocol import lacking

    if missing := lacking(getattr(module, "primitives", None)):
        raise IncompleteBackendError(
            f"the backend {name!r} ({module.__name__}) lacks the primitives {', '.join(missing)}: "
            "its attribute 'primitives' must have every member of flix.backends.protocol.Backend; "
            "see docs/write-a-backend.md"
        )


def missing(backend: str, framework: str, error: ImportError) -> MissingFrameworkError:
    """The error for a backend whose framework cannot be imported."""
    return MissingFrameworkError(
        f"the {backend} backend needs {framework}, which is not installed ({error}); "
        f'install it with: pip install "flix-peft[{backend}]"'
    )
