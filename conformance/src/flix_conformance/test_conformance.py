"""One test for each check and backend, or pair of them; run by ``pytest --pyargs flix_conformance``."""

from __future__ import annotations

import pytest

from flix_conformance import plugin

try:
    from flix_conformance import runner
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise ImportError(
        'the conformance kit needs hypothesis: pip install "flix-peft[conformance]"'
    ) from error


def test_installed(request: pytest.FixtureRequest) -> None:
    """The backends that are named on the command line are there; without names, at least one is."""
    session = plugin.session_of(request.config)
    found = session.backends()
    missing = [f"{name}: {why}" for name, why in session.missing.items() if session.named]
    if missing or not found:
        why = "; ".join(missing) or "no backend is registered and installed"
        pytest.fail(f"nothing was checked on backends that are not installed: {why}", pytrace=False)


def _run(check: str, column: str, request: pytest.FixtureRequest) -> None:
    backends = plugin.session_of(request.config).backends()
    chosen = [backends[name] for name in column.split("+")]
    try:
        profile, seed = (request.config.getoption(f"--flix-{o}") for o in ("profile", "seed"))
        runner.run(check, *chosen, profile=profile, start=seed)
    except runner.NotOffered as reason:
        pytest.skip(str(reason))


def test_backend(check: str, column: str, request: pytest.FixtureRequest) -> None:
    """One check on one backend."""
    _run(check, column, request)


def test_pair(check: str, column: str, request: pytest.FixtureRequest) -> None:
    """One check of pairs on one pair of backends."""
    _run(check, column, request)
