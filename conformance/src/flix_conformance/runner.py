"""Finding backends, and running one check on them."""

from __future__ import annotations

import importlib
import importlib.util
import math
import zlib
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import flix
import flix.backends
from flix.backends.protocol import lacking
from flix_conformance.backend import Backend
from flix_conformance.checks import CHECKS, Check, NotOffered
from flix_conformance.checks._registry import offered
from flix_conformance.harness import Harness
from flix_conformance.strategies import PROFILES, Draw, Profile


class NotInstalledError(Exception):
    """A backend whose framework, or whose package, is not installed."""


class NoHarnessError(Exception):
    """A backend that shows the kit no harness, or one that lacks something."""


def registered() -> list[str]:
    """The names of all backends that are registered."""
    return list(flix.backends.available())


def triton_first() -> None:
    """Load triton, if it is installed, before any framework.

    torch loads it late. Its LLVM then finds that TensorFlow's has registered the same options, and ends the process; in
    the other order, both live.
    """
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton")


def load(name: str) -> Backend:
    """A backend by its registered name, or ``name=module`` for one that is not registered.

    Raises:
        NotInstalledError: its framework is missing; the message says what to install.
        NoHarnessError: its module has no ``harness()``, nor has a submodule ``conformance`` of it; or what that gives
            lacks something, which is named.
        IncompleteBackendError: its module lacks primitives; they are named.
        KeyError: no backend of this name.
        ImportError: its own modules are broken.
    """
    triton_first()
    name, _, path = name.partition("=")
    try:
        module = importlib.import_module(path) if path else flix.backends.get(name)
    except (ModuleNotFoundError, flix.MissingFrameworkError) as error:
        raise NotInstalledError(str(error)) from error
    submodule = f"{module.__name__}.conformance"
    source = module
    try:
        source = importlib.import_module(submodule)
    except ModuleNotFoundError as error:
        if error.name != submodule:
            raise NotInstalledError(str(error)) from error
    if not hasattr(source, "harness"):
        raise NoHarnessError(
            f"backend {name!r}: neither {submodule} nor {module.__name__} has a function harness(); "
            "see flix_conformance.harness for what it returns"
        )
    flix.backends.check(module, name)
    harness = source.harness()
    _check_harness(harness, name)
    return Backend(name, module, harness)


# What every harness has beside its methods, each with a value that must be in it.
_ALWAYS = {"dtypes": "float32", "strategies": "auto", "kinds": "linear"}


def _check_harness(harness: Any, name: str) -> None:
    """Hold a harness to :class:`flix_conformance.harness.Harness`."""
    missing = [a for a in _ALWAYS if not hasattr(harness, a)] + [*lacking(harness, Harness)]
    if missing:
        raise NoHarnessError(
            f"backend {name!r}: its harness lacks {', '.join(missing)}; see flix_conformance.harness.Harness"
        )
    for attribute, value in _ALWAYS.items():
        if value not in (found := getattr(harness, attribute)):
            raise NoHarnessError(
                f"backend {name!r}: its harness has {attribute} = {found!r}; {value!r} must be among them, since some "
                "checks ask for it"
            )


def run(check: Check | str, *backends: Backend, profile: Profile | str = "ci") -> None:
    """Run one check.

    Args:
        check: the check, or its name.
        backends: one, or two for a check of pairs.
        profile: how much is tried, or its name.

    Raises:
        AssertionError: the rule is broken (or whatever the backend raised).
        NotOffered: the backend does not offer what the check is about.
    """
    chosen = CHECKS[check] if isinstance(check, str) else check
    found = PROFILES[profile] if isinstance(profile, str) else profile
    offered(chosen, *backends)

    total = max(1, math.ceil(chosen.examples * found.examples))
    turns = min(total, found.pool)
    for turn in range(turns):
        # One more than its share: hypothesis begins with the simplest example that there is.
        _run_turn(chosen, backends, found, turn, turns, math.ceil(total / turns) + 1)


def _run_turn(
    check: Check,
    backends: tuple[Backend, ...],
    profile: Profile,
    turn: int,
    turns: int,
    examples: int,
) -> None:
    """The examples of one part of the signatures."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[Phase.generate, Phase.shrink] if profile.shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        check.run(Draw(data, profile, backends, turn, turns), *backends)

    if profile.fixed:
        holds = seed(zlib.crc32(f"{check.name}:{turn}".encode()))(holds)
    holds()


__all__ = ["NoHarnessError", "NotInstalledError", "NotOffered", "load", "registered", "run"]
