"""The report: a row a check, a column a backend (or a pair of them), as text and as JSON."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flix_conformance.checks import CHECKS

MARKS = {
    "passed": "pass",
    "failed": "FAIL",
    "expected failure": "xfail",
    "unexpected pass": "XPASS",
    "not offered": "-",
    "not implemented": "todo",
    "not installed": "not installed",
}


@dataclass
class Report:
    """What came out.

    Attributes:
        profile: its name.
        missing: backends that are not installed, and why.
        described: of each backend, its versions and what it offers.
        cells: ``{(check, column): {"outcome", "seconds", "message"}}``; of failures, ``"trace"`` and ``"replay"`` too;
            ``"core"`` where none of the backend's own code ran.
        seed: what a profile with new examples in every run drew them from.
    """

    profile: str = "ci"
    missing: dict[str, str] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)
    cells: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    seed: int | None = None

    def columns(self, pair: bool) -> list[str]:
        """Backends, or pairs, by name (processes that share the work report in any order)."""
        found = dict.fromkeys(
            sorted(column for check, column in self.cells if CHECKS[check].pair == pair)
        )
        return [*found, *(() if pair else (m for m in self.missing if m not in found))]

    def _outcome(self, check: str, column: str) -> str:
        if column in self.missing:
            return "not installed"
        return str(self.cells.get((check, column), {}).get("outcome", ""))

    def text(self) -> str:
        """Two tables: backends, and pairs of backends."""
        parts = [f"flix conformance, profile {self.profile}"]
        for pair in (False, True):
            columns = self.columns(pair)
            names = [n for n, c in CHECKS.items() if c.pair == pair]
            if not columns:
                continue
            rows = [["check", *columns]]
            for name in names:
                marks = [self._mark(name, c) for c in columns]
                if any(marks):
                    rows.append([name, *marks])
            if not pair:
                rows.append(["seconds", *(self._seconds(c) for c in columns)])
            parts.append(_table(rows))
        parts += [f"{name}: not installed: {why}" for name, why in self.missing.items()]
        if any(cell.get("core") for cell in self.cells.values()):
            parts.append(
                "*: the core's code alone ran; the harness shows none of the backend's own"
            )
        if todo := sum(cell["outcome"] == "not implemented" for cell in self.cells.values()):
            parts.append(
                f"todo: the backend's own code raised NotImplementedError ({todo} checks); these show nothing yet"
            )
        return "\n\n".join(parts)

    def _mark(self, check: str, column: str) -> str:
        star = "*" if self.cells.get((check, column), {}).get("core") else ""
        return MARKS.get(self._outcome(check, column), "") + star

    def _seconds(self, column: str) -> str:
        return f"{sum(c['seconds'] for (_, own), c in self.cells.items() if own == column):.0f}"

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        kinds: dict[str, list[Any]] = {"checks": [], "pairs": []}
        for name, check in CHECKS.items():
            results = {c: cell for (own, c), cell in self.cells.items() if own == name}
            if not check.pair:
                results |= {
                    m: {"outcome": "not installed", "seconds": 0.0, "message": why}
                    for m, why in self.missing.items()
                }
            entry = {"check": name, "rule": check.rule, "results": results}
            kinds["pairs" if check.pair else "checks"].append(entry)
        data = {
            "kit": "flix-conformance",
            "versions": _versions(),
            "profile": self.profile,
            "seed": self.seed,
            "backends": self.described,
            "not_installed": self.missing,
            **kinds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    import platform

    import hypothesis
    import numpy as np

    import flix
    from flix_conformance import __version__

    return {
        "flix_conformance": __version__,
        "flix": flix.__version__,
        "hypothesis": hypothesis.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _table(rows: list[list[str]]) -> str:
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
