"""The pytest plugin: options, one test for each check and backend, the report.

Works under pytest-xdist: outcomes travel as properties of the tests' reports.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Generator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

_PROFILES = ("quick", "ci", "nightly")
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
        help="how much is tried: ci (minutes, the same examples in every run), quick (a fifth of them, while a "
        "backend is being written) or nightly (20 times as many, new ones in every run)",
    )
    group.addoption(
        "--flix-seed",
        type=int,
        metavar="N",
        help="what nightly's examples are drawn from, to replay a run; default: another in every run",
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
        self.cells: list[tuple[str, str, dict[str, Any]]] = []
        self.described: dict[str, Any] = {}
        self._told: dict[str, Any] = {}
        self._done = False

    @property
    def seed(self) -> int:
        """What a profile that has new examples in every run draws them from."""
        return int(self.config.getoption("--flix-seed"))

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
            # As text: workers of pytest-xdist send no subclasses, such as torch's version.
            item.user_properties.append(("flix_described", json.dumps(self._descriptions())))
            if (cell := _cell(item)) is not None:
                item.user_properties.append(("flix_check", list(cell)))
                item.user_properties.append(("flix_core", self._core_alone(*cell)))
                item.user_properties.append(("flix_replay", self.replay(item, *cell)))

    def _descriptions(self) -> dict[str, Any]:
        """What the report says of each backend."""
        from flix_conformance import offered

        if not self._told:
            self._told = {name: offered.described(b) for name, b in self.loaded.items()}
        return self._told

    def _core_alone(self, name: str, column: str) -> bool:
        """Whether a check runs no code of the backends, but the core's."""
        from flix_conformance.checks import CHECKS

        method = CHECKS[name].core
        chosen = [self.loaded[backend] for backend in column.split("+")]
        return method is not None and all(not hasattr(b.harness, method) for b in chosen)

    def replay(self, item: pytest.Item, check: str, column: str) -> str:
        """The command that runs one check again, with the same examples."""
        own = {name.partition("=")[0]: name for name in self.named}
        backends = " ".join(f"--flix-backend {own.get(n, n)}" for n in column.split("+"))
        profile = self.config.getoption("--flix-profile")
        drawn = "" if profile == "ci" else f" --flix-profile {profile}"
        drawn += f" --flix-seed {self.seed}" if profile == "nightly" else ""
        test = f"{item.originalname}[{column}-{check}]"  # type: ignore[attr-defined]
        return f"pytest --pyargs flix_conformance {backends}{drawn} -k '{test}'"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, Any, Any]:
        report = yield
        if _ours(item) and call.excinfo is not None:
            report.user_properties.append(("flix_said", str(call.excinfo.value)))
            if report.failed and (replay := dict(item.user_properties).get("flix_replay")):
                report.sections.append(("replay", str(replay)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        self.missing.update(properties.get("flix_missing", {}))  # type: ignore[call-overload]
        cell: Any = properties.get("flix_check")
        if cell is not None and report.when == "call":
            self.described.update(json.loads(str(properties.get("flix_described", "{}"))))
            outcome, trace = _outcome(report)
            found: dict[str, Any] = {"outcome": outcome, "seconds": round(report.duration, 2)}
            found["message"] = str(properties.get("flix_said", ""))[:2000]
            if outcome == "failed":
                found |= {"trace": trace, "replay": properties["flix_replay"]}
            if properties["flix_core"]:
                found["core"] = True
            self.cells.append((cell[0], cell[1], found))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.cells and not self.missing:
            return
        from flix_conformance.report import Report

        profile = self.config.getoption("--flix-profile")
        report = Report(profile, dict(self.missing), self.described, seed=self.seed)
        for check, column, found in self.cells:
            report.cells[check, column] = found
        terminalreporter.section("flix conformance")
        terminalreporter.write_line(report.text())
        if (path := self.config.getoption("--flix-report")) is not None:
            report.write(path)
            terminalreporter.write_line(f"\nreport written to {path}")


_session = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    if config.option.flix_seed is None:  # workers of pytest-xdist get the first process's
        config.option.flix_seed = secrets.randbelow(2**31)
    config.stash[_session] = Session(config)
    config.pluginmanager.register(config.stash[_session], "flix_conformance_session")


def session_of(config: pytest.Config) -> Session:
    """This run's backends."""
    return config.stash[_session]


def _ours(item: Any) -> bool:
    return str(item.module.__name__ if hasattr(item, "module") else "").endswith(_MODULE)


def _cell(item: pytest.Item) -> tuple[str, str] | None:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if _ours(item) and isinstance(parameters.get("check"), str):
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
        from flix_conformance.runner import UNFINISHED

        unfinished = f"Skipped: {UNFINISHED}" in text
        return "not implemented" if unfinished else "not offered", text
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
