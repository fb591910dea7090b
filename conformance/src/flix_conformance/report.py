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
    "not installed": "not installed",
}


@dataclass
class Report:
    """What came out.

    Attributes:
        profile: its name.
        missing: backends that are not installed, and why.
        cells: ``{(check, column): {"outcome", "seconds", "message"}}``.
    """

    profile: str = "ci"
    missing: dict[str, str] = field(default_factory=dict)
    cells: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def add(self, check: str, column: str, outcome: str, seconds: float, message: str) -> None:
        """Enter the outcome of one check on one column."""
        self.cells[check, column] = {
            "outcome": outcome,
            "seconds": round(seconds, 2),
            "message": message,
        }

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
                marks = [MARKS.get(self._outcome(name, c), "") for c in columns]
                if any(marks):
                    rows.append([name, *marks])
            if not pair:
                rows.append(["seconds", *(self._seconds(c) for c in columns)])
            parts.append(_table(rows))
        parts += [f"{name}: not installed: {why}" for name, why in self.missing.items()]
        return "\n\n".join(parts)

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
            "profile": self.profile,
            "not_installed": self.missing,
            **kinds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
