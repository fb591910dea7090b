"""The command line, ``flix``. Importing it loads no framework."""

from __future__ import annotations

import sys
from typing import NoReturn

from flix.cli.streams import drop_output, flush, mistake

_OWN = ("typer", "click", "rich", "pydantic", "pydantic_core", "yaml")


def main() -> NoReturn:
    """Run the command line and exit: 0 on success, 2 on a mistake of the user, 130 on Ctrl-C (one line each)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that lacks a letter shows its number instead of a traceback.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run()
        flush()  # help and the version, too, go to readers that may have left
    except KeyboardInterrupt:  # commands are being imported; once one runs, it says this itself
        print("flix: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        drop_output()
        code = 0
    except OSError as error:
        code = mistake(f"{error.filename or 'standard output'}: {error.strerror or error}")
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OWN:
            raise
        code = mistake(
            f"the command line needs {package}, which is not installed; install it with: "
            'pip install "flix-peft[cli]"'
        )
    raise SystemExit(code)


def _run() -> int:
    from flix.cli.app import app

    try:
        result = app(standalone_mode=False)
    except Exception as error:
        # typer's errors about arguments, which it shows in four lines. (They are click's, or of a copy of its own.)
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        if (
            type(error).__name__ == "Abort"
        ):  # what typer makes of Ctrl-C while it reads the arguments
            raise KeyboardInterrupt from None
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        more = f"; see {context.command_path} --help" if context is not None else ""
        return mistake(error.format_message().rstrip(".") + more)
    return result if isinstance(result, int) else 0


__all__ = ["main"]
