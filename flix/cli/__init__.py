"""The command line, ``flix``. Importing it loads no framework."""

from __future__ import annotations

import sys

_OWN = ("typer", "click", "rich", "pydantic", "pydantic_core", "yaml")


def main() -> None:
    """Run the command line and exit: 0 on success, 2 on a user's mistake (one line on standard error)."""
    try:
        from flix.cli.app import app

        app()
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OWN:
            raise
        print(
            f"flix: error: the command line needs {package}, which is not installed; install it with: "
            'pip install "flix-peft[cli]"',
            file=sys.stderr,
        )
        raise SystemExit(2) from None


__all__ = ["main"]
