"""Errors of data that its user can mend."""

from __future__ import annotations

from flix.core.errors import FlixError, MissingFrameworkError


class DataError(FlixError, ValueError):
    """Data that is missing, or that does not have the form that was declared."""


def missing_extra(what: str, extra: str, error: ImportError) -> MissingFrameworkError:
    """The error for a package of an extra that is not installed."""
    package = (error.name or str(error)).partition(".")[0]
    return MissingFrameworkError(
        f'{what} needs {package}, which is not installed; install it with: pip install "flix-peft[{extra}]"'
    )
