"""What one section found, written after every figure, so that a section that ends early loses nothing."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import Table

T = TypeVar("T")


class Record:
    """A section's findings and the time that it has.

    Args:
        path: the JSON file.
        seconds: until which nothing new is begun.
        dry: tiny sizes, without a device: figures mean nothing.

    Attributes:
        data: ``figures``, ``errors`` by what was tried, ``skipped`` with the reason, ``tables``.
    """

    def __init__(self, path: Path, seconds: float, dry: bool = False) -> None:
        self.path, self.dry = path, dry
        self.end = time.monotonic() + seconds
        self.data: dict[str, Any] = {"figures": {}, "errors": {}, "skipped": {}, "tables": []}
        self.write()

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def put(self, name: str, value: Any) -> None:
        """Keep a figure."""
        self.data["figures"][name] = value
        self.write()

    def table(self, table: Table) -> None:
        """Keep a table."""
        self.data["tables"].append(vars(table))
        self.write()

    def skip(self, name: str, why: str) -> None:
        """Say that something was not tried."""
        self.data["skipped"][name] = why
        print(f"  {name}: skipped, {why}", flush=True)
        self.write()

    def attempt(self, name: str, call: Callable[[], T], needs: float = 5.0) -> T | None:
        """Try something; an error is written down, and the section goes on. What is not installed is skipped.

        Args:
            name: of what is tried.
            call: does it.
            needs: the seconds that it may take; it is skipped where fewer are left.

        Returns:
            What came of it, or None.
        """
        if self.left() < needs:
            self.skip(name, "no time was left")
            return None
        begun = time.monotonic()
        try:
            return call()
        except ImportError as error:
            self.skip(name, str(error))
            return None
        except Exception as error:  # an error here must not cost the other figures
            lines = traceback.format_exc().strip().splitlines()
            self.data["errors"][name] = "\n".join(lines[-12:])
            print(f"  {name}: {type(error).__name__}: {error}", flush=True)
            return None
        finally:
            self.put(f"{name}, s", round(time.monotonic() - begun, 2))

    def write(self) -> None:
        """Write the file anew."""
        aside = self.path.with_suffix(".part")
        aside.write_text(json.dumps(self.data, indent=1, default=_plain), encoding="utf-8")
        os.replace(aside, self.path)


def _plain(value: Any) -> Any:
    if hasattr(value, "median"):  # a Figure
        return vars(value)
    return float(value)
