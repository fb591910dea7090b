"""``flix backends``."""

from __future__ import annotations

from importlib.metadata import entry_points, packages_distributions, version

from flix import backends as known
from flix.cli.console import show_json, show_table
from flix.cli.options import Json


def backends(as_json: Json = False) -> None:
    """List the backends, and which are installed."""
    rows = [
        {
            "backend": name,
            "installed": installed,
            "version": _version(name) if installed else None,
            "install": None if installed else f'pip install "flix-peft[{name}]"',
        }
        for name, installed in known.available().items()
    ]
    if as_json:
        show_json(rows)
        return
    show_table(
        ["backend", "installed", "version", ""],
        [
            [str(r["backend"]), r["installed"], r["version"] or "-", r["install"] or ""]
            for r in rows
        ],
    )


def _version(backend: str) -> str | None:
    """The version of a backend's framework, or of the package that a foreign backend comes from."""
    for package in packages_distributions().get(
        backend, ()
    ):  # TensorFlow's is tensorflow-cpu, or another
        return version(package)
    for entry in entry_points(group=known.GROUP, name=backend):
        if entry.dist is not None:
            return entry.dist.version
    return None
