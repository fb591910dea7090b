"""The two streams: a mistake's line, and standard output when nobody takes it (its reader left, or a disk is full)."""

from __future__ import annotations

import os
import sys


def mistake(message: str) -> int:
    """Say a user's mistake in one line on standard error; gives the exit code."""
    print("flix: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def say(text: str) -> None:
    """Print a text.

    Raises:
        OSError: nobody takes it; what is left is dropped, so that nothing fails again at exit.
    """
    try:
        print(text)
    except OSError as error:
        raise _dropped(error) from None


def flush() -> None:
    """Hand on what standard output holds.

    Raises:
        OSError: as :func:`say`.
    """
    try:
        if sys.stdout is not None:  # closed by whoever called us
            sys.stdout.flush()
    except OSError as error:
        raise _dropped(error) from None


def _dropped(error: OSError) -> OSError:
    drop_output()
    # By its number this may be a BrokenPipeError.
    return OSError(error.errno, error.strerror, "standard output")


def drop_output() -> None:
    """Let standard output lead nowhere from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # no file, as in tests
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    finally:
        os.close(nowhere)
