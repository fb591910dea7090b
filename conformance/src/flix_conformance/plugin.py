"""The pytest plugin: options, one test for each check and backend, the report.

Works under pytest-xdist: outcomes travel as properties of the tests' reports.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

_PROFILES = ("ci", "nightly")
_MODULE = "flix_conformance.test_conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flix conformance")
    group.addoption(
        "--flix-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="a backend to check, by its registered name, or NAME=MODULE for one that is not "
        "registered; repeatable; default: all that are installed",
    )
    group.addoption(
        "--flix-profile",
        choices=_PROFILES,
        default="ci",
        help="how much is tried: ci (minutes, the same examples in every run) or nightly (20 times as "
        "many, new ones in every run)",
    )
    group.addoption(
        "--flix-expected-failures",
        type=Path,
        metavar="FILE",
        help="lines 'check: reason' or 'check[backend]: reason'; an unexpected pass fails",
    )
    group.addoption(
        "--flix-report", type=Path, metavar="FILE.json", help="also write the report as JSON"
    )


class Session:
    """One run: its backends, loaded once a process, when collection first asks; and what came out."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.named = list(dict.fromkeys(config.getoption("--flix-backend")))
        self.loaded: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self.problems: list[str] = []
        self.cells: list[tuple[str, str, str, str, float]] = []
        self._done = False

    def backends(self) -> dict[str, Any]:
        """The backends that are installed, by name."""
        from flix_conformance import runner

        if not self._done:
            self._done = True
            for name in self.named or runner.registered():
                try:
                    backend = runner.load(name)
                    self.loaded[backend.name] = backend
                except runner.NotInstalledError as error:
                    self.missing[name.partition("=")[0]] = str(error)
                except ImportError as error:
                    self.problems.append(f"backend {name!r} cannot be imported: {error}")
                except (KeyError, TypeError, runner.NoHarnessError) as error:
                    self.problems.append(str(error.args[0]))
        return self.loaded

    def columns(self, pair: bool) -> list[str]:
        """What checks run on: backends, or pairs as ``first+second``."""
        names = list(self.backends())
        return ["+".join(two) for two in combinations(names, 2)] if pair else names

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if _ours(item):
            item.user_properties.append(("flix_missing", dict(self.missing)))
            if (cell := _cell(item)) is not None:
                item.user_properties.append(("flix_check", list(cell)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        self.missing.update(properties.get("flix_missing", {}))  # type: ignore[call-overload]
        cell: Any = properties.get("flix_check")
        if cell is not None and report.when == "call":
            self.cells.append((cell[0], cell[1], *_outcome(report), report.duration))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.cells and not self.missing:
            return
        from flix_conformance.report import Report

        report = Report(self.config.getoption("--flix-profile"), dict(self.missing))
        for check, column, outcome, message, seconds in self.cells:
            report.add(check, column, outcome, seconds, message)
        terminalreporter.section("flix conformance")
        terminalreporter.write_line(report.text())
        if (path := self.config.getoption("--flix-report")) is not None:
            report.write(path)
            terminalreporter.write_line(f"\nreport written to {path}")


_session = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_session] = Session(config)
    config.pluginmanager.register(config.stash[_session], "flix_conformance_session")


def session_of(config: pytest.Config) -> Session:
    """This run's backends."""
    return config.stash[_session]


def _ours(item: Any) -> bool:
    return str(item.module.__name__ if hasattr(item, "module") else "").endswith(_MODULE)


def _cell(item: pytest.Item) -> tuple[str, str] | None:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if _ours(item) and "check" in parameters and "column" in parameters:
        return parameters["check"], parameters["column"]
    return None


def _outcome(report: pytest.TestReport) -> tuple[str, str]:
    why = getattr(report, "wasxfail", None)
    text = str(report.longrepr) if report.longrepr else ""
    if why is not None:
        return "expected failure", why
    if report.failed and text.startswith("[XPASS(strict)]"):
        return "unexpected pass", text
    if report.skipped:
        return "not offered", text
    return report.outcome, text[-2000:]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.module.__name__.endswith(_MODULE):
        return
    from flix_conformance.checks import CHECKS

    session = session_of(metafunc.config)
    if "column" in metafunc.fixturenames:
        pair = metafunc.function.__name__ == "test_pair"
        cells = [
            (name, column)
            for column in session.columns(pair)
            for name, check in CHECKS.items()
            if check.pair == pair
        ]
        ids = [f"{column}-{name}" for name, column in cells]
        metafunc.parametrize(("check", "column"), cells, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if problems := session_of(config).problems:
        raise pytest.UsageError(*problems)
    path = config.getoption("--flix-expected-failures")
    if path is None:
        return
    from flix_conformance import expected
    from flix_conformance.checks import CHECKS

    try:
        known = expected.read(path, CHECKS)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error
    for item in items:
        cell = _cell(item)
        why = None if cell is None else expected.reason(known, *cell)
        if why is not None:
            item.add_marker(pytest.mark.xfail(reason=why, strict=True))


__all__ = ["Session", "session_of"]
