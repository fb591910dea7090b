"""Finding backends, and running one check on them."""

from __future__ import annotations

import importlib
import importlib.util
import math
import zlib
from collections.abc import Sequence

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import flix
import flix.backends
from flix_conformance.backend import Backend
from flix_conformance.checks import CHECKS, Check, NotOffered
from flix_conformance.checks._registry import offered
from flix_conformance.offered import NoHarnessError, check_harness, check_strategies
from flix_conformance.strategies import PROFILES, Draw, Profile

UNFINISHED = (
    "not implemented"  # how a reason begins where a backend's own code raised NotImplementedError
)


class NotInstalledError(Exception):
    """A backend whose framework, or whose package, is not installed."""


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
    check_harness(harness, name)
    backend = Backend(name, module, harness)
    check_strategies(backend)
    return backend


def run(
    check: Check | str, *backends: Backend, profile: Profile | str = "ci", start: int = 0
) -> None:
    """Run one check.

    Args:
        check: the check, or its name.
        backends: one, or two for a check of pairs.
        profile: how much is tried, or its name.
        start: what the examples of a profile that has new ones in every run are drawn from.

    Raises:
        AssertionError: the rule is broken (or whatever the backend raised).
        NotOffered: the backend does not offer what the check is about, or its own code raised a NotImplementedError
            (the check of outputs excepted: without them there is no backend).
    """
    chosen = CHECKS[check] if isinstance(check, str) else check
    found = PROFILES[profile] if isinstance(profile, str) else profile
    offered(chosen, *backends)

    total = max(1, math.ceil(chosen.examples * found.examples))
    turns = min(total, found.pool)
    for turn in range(turns):
        # One more than its share: hypothesis begins with the simplest example that there is.
        try:
            _run_turn(chosen, backends, found, turn, turns, math.ceil(total / turns) + 1, start)
        except NotImplementedError as error:
            if chosen.name != "forward" and _by_a_backend(error, backends):
                raise NotOffered(f"{UNFINISHED}: {error}" if str(error) else UNFINISHED) from error
            raise


def _by_a_backend(error: Exception, backends: Sequence[Backend]) -> bool:
    """Whether a backend's own code raised an error, not a library that it calls."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    raised = "" if place is None else str(place.tb_frame.f_globals.get("__name__"))
    own = [n for b in backends for n in (b.module.__name__, type(b.harness).__module__)]
    return any(raised == name or raised.startswith(f"{name}.") for name in own)


def _run_turn(
    check: Check,
    backends: tuple[Backend, ...],
    profile: Profile,
    turn: int,
    turns: int,
    examples: int,
    start: int,
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

    key = f"{check.name}:{turn}" if profile.fixed else f"{check.name}:{turn}:{start}"
    seed(zlib.crc32(key.encode()))(holds)()


__all__ = ["NoHarnessError", "NotInstalledError", "NotOffered", "load", "registered", "run"]
