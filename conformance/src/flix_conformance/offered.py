"""What a backend says that it offers, looked at before the first check: a slip is an error, not a row of dashes."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import numpy as np

import flix
from flix.backends.protocol import lacking, members
from flix_conformance.harness import Harness

ABILITIES = {
    "gradients": "gradients",
    "training": "trainer",
    "merge": "",
    "files": "",
    "changes": "",
}
"""What a backend may do without (``Harness.absent``), each with the method that its harness then needs not have."""

OPTIONAL = (
    "encode", "dropout", "refuse", "within", "excluded", "id_dtypes", "evaluated", "compiled_forward", "fit", "unfreeze",
    "absent", "nested", "forms", "largest", "ways", "loops", "experts", "search",
)  # fmt: skip
_NO_METHODS = ("excluded", "id_dtypes", "absent", "nested", "forms")
_KNOWN = {"dtypes": ("float32", "bfloat16", "float64"), "kinds": ("linear", "embedding")}
# What every harness has beside its methods, each with a value that must be in it.
_ALWAYS = {"dtypes": "float32", "strategies": "auto", "kinds": "linear"}


class NoHarnessError(Exception):
    """A backend that shows the kit no harness, or one that lacks something."""


def check_harness(harness: Any, name: str) -> None:
    """Hold a harness to :class:`flix_conformance.harness.Harness`.

    Raises:
        NoHarnessError: it lacks something, or says something that cannot be; what is wrong, and what can be, is named.
    """

    def refuse(what: str) -> NoHarnessError:
        return NoHarnessError(f"backend {name!r}: its harness {what}")

    absent = _texts(harness, "absent", refuse) if hasattr(harness, "absent") else ()
    _check_known("absent", absent, tuple(ABILITIES), refuse)
    spared = {ABILITIES[ability] for ability in absent}
    needed = [m for m in lacking(harness, Harness) if m not in spared]
    if missing := [a for a in _ALWAYS if not hasattr(harness, a)] + needed:
        raise refuse(f"lacks {', '.join(missing)}; see flix_conformance.harness.Harness")
    for attribute, value in _ALWAYS.items():
        found = _texts(harness, attribute, refuse)
        _check_known(attribute, found, _KNOWN.get(attribute), refuse)
        if value not in found:
            raise refuse(
                f"has {attribute} = {found!r}; {value!r} must be among them, since some checks ask for it"
            )
    for pair in getattr(harness, "excluded", ()):  # of a strategy that is perhaps not there today
        if isinstance(pair, str) or len(pair) != 2:
            raise refuse(f"has {pair!r} among its excluded; pairs (strategy, dtype) are wanted")
        _check_known("excluded", pair[1:], _KNOWN["dtypes"], refuse)
    for dtype in getattr(harness, "id_dtypes", ()):
        if np.dtype(dtype).kind not in "iu":
            raise refuse(f"has {dtype!r} among its id_dtypes, which is no integer")
    if hasattr(harness, "forms"):
        _texts(harness, "forms", refuse)
    if not isinstance(getattr(harness, "nested", False), bool):
        raise refuse(f"has nested = {harness.nested!r}; True or False is wanted")
    for name in (n for n in OPTIONAL if n not in _NO_METHODS and hasattr(harness, n)):
        if not callable(getattr(harness, name)):
            raise refuse(f"has {name} = {getattr(harness, name)!r}; a method is wanted")
    known = {*OPTIONAL, *_ALWAYS, *members(Harness)}
    for public in (a for a in dir(harness) if not a.startswith("_") and a not in known):
        if near := get_close_matches(public, OPTIONAL, 1, 0.85):
            raise refuse(f"has {public!r}, which the kit does not know; did you mean {near[0]!r}?")


def _texts(harness: Any, attribute: str, refuse: Any) -> tuple[str, ...]:
    found = getattr(harness, attribute)
    if isinstance(found, str) or not all(isinstance(value, str) for value in found):
        raise refuse(f"has {attribute} = {found!r}; a tuple of names is wanted")
    if len(set(found)) < len(found):
        raise refuse(f"has {attribute} = {found!r}, with one of them twice")
    return tuple(found)


def _check_known(attribute: str, found: Any, known: tuple[str, ...] | None, refuse: Any) -> None:
    for value in found:
        if known is not None and value not in known:
            raise refuse(
                f"has {value!r} among its {attribute}, which there is not; there are {', '.join(known)}"
            )


def check_strategies(backend: Any) -> None:
    """Adapt a small model in every strategy that the harness names.

    Raises:
        NoHarnessError: the backend refuses one, as a slip in its name would be.
    """
    from flix_conformance.harness import Layer

    config = flix.FlixConfig(
        registry=flix.FeatureRegistry({"group": ["feature"]}), ranks=1, target_modules=("proj",)
    )
    layer = Layer("proj", "linear", np.ones((2, 2), np.float32))
    for strategy in backend.strategies:
        try:
            plain = backend.harness.plain([layer], np.ones((1, 2), np.float32))
            backend.verb("adapt")(plain, config, strategy=strategy)
        except flix.ConfigError as error:
            if strategy in str(error):
                raise NoHarnessError(
                    f"backend {backend.name!r}: its harness has {strategy!r} among its strategies, which adapt "
                    f"refuses: {error}"
                ) from error
        except Exception:
            continue


def versions(backend: Any) -> dict[str, str]:
    """Of the packages whose modules the backend's and its harness's modules hold."""
    found: dict[str, str] = {}
    for source in (backend.module, sys.modules.get(type(backend.harness).__module__)):
        held = [source, *vars(source).values()] if source is not None else []
        for value in held:
            root = value.__name__.partition(".")[0] if isinstance(value, ModuleType) else ""
            version = getattr(sys.modules.get(root), "__version__", None)
            if isinstance(version, str):
                found[root] = version
    return dict(sorted(found.items()))


def described(backend: Any) -> dict[str, Any]:
    """What the report says of a backend."""
    names = ("dtypes", "strategies", "kinds", "id_dtypes", "absent")
    offered = {name: list(getattr(backend, name)) for name in names}
    offered |= {"forms": list(getattr(backend.harness, "forms", ()))}
    return {"versions": versions(backend), **offered, "excluded": [*map(list, backend.excluded)]}
