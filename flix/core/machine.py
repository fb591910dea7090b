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
    """The command line of this process, as it was typed: ``flix ...``, ``python -m MODULE ...`` or a script."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec is not None else ""
    if module in ("flix", "flix.cli") or os.path.basename(sys.argv[0]) == "flix":
        return ["flix", *sys.argv[1:]]
    return [*(["python", "-m", module] if module else [sys.argv[0]]), *sys.argv[1:]]


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
