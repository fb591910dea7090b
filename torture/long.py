"""Long use: the slow stress tests of all backends (threads, tasks, steps, shapes, a feature's coming and going)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from torture.report import ROOT


def run(only: list[str], seed: int = 0, few: bool = False) -> list[dict[str, Any]]:
    """Run them, each backend's in a process of its own.

    Args:
        only: the backends; default: all.
        seed: not used: the tests have seeds of their own.
        few: torch's alone.

    Returns:
        A row a test: ``what``, ``wrong`` if it failed, ``seconds``, and what it recorded.
    """
    found = []
    files = sorted((ROOT / "tests" / "backends").glob("*/test_stress.py"))
    for file in files:
        backend = file.parent.name
        if (only and backend not in only) or (few and backend != "torch"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-m",
                "slow or not slow",
                str(file),
                f"--junitxml={report}",
            ]
            subprocess.run(command, cwd=ROOT)
            found += _rows(backend, report)
    return found


def _rows(backend: str, report: Path) -> list[dict[str, Any]]:
    if not report.exists():
        return [{"what": backend, "wrong": {"the tests did not run": 1}}]
    rows = []
    for case in ET.parse(report).getroot().iter("testcase"):
        name = case.get("name", "").removeprefix("test_").replace("_", " ")
        row: dict[str, Any] = {
            "what": f"{backend}: {name}",
            "seconds": round(float(case.get("time", 0))),
        }
        row |= {p.get("name", ""): p.get("value") for p in case.iter("property")}
        if (failure := case.find("failure")) is not None or (
            failure := case.find("error")
        ) is not None:
            row["wrong"] = {(failure.get("message") or "failed")[:200]: 1}
        row["result"] = (
            "failed"
            if "wrong" in row
            else "skipped"
            if case.find("skipped") is not None
            else "as promised"
        )
        rows.append(row)
    return rows
