"""The machine and the versions that something ran with."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flix._version import __version__


def machine(device: str) -> dict[str, Any]:
    """The system, its processors, and the device that was used."""
    return {"system": platform.platform(), "processors": os.cpu_count(), "device": device}


def command() -> list[str]:
    """The command line of this process."""
    own = os.path.basename(sys.argv[0]) in ("flix", "__main__.py")
    return ["flix" if own else sys.argv[0], *sys.argv[1:]]


def versions(*packages: str) -> dict[str, str]:
    """The versions of flix, Python and those packages that are installed."""
    found = {"flix": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """The most memory that this process held, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
