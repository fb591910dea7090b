"""Errors of a run that its user can mend; the command line turns them into one line and exit code 2."""

from __future__ import annotations

from flix.core.errors import FlixError, MissingFrameworkError


class SettingsError(FlixError, ValueError):
    """A configuration file that cannot be read, or that breaks a rule."""


class DataError(FlixError, ValueError):
    """Data that is missing or not of the form that the configuration says."""


class ModelError(FlixError, ValueError):
    """A base model or tokenizer that cannot be loaded, or of another kind than was said."""


class RunError(FlixError, ValueError):
    """An output folder that does not fit what is asked of it."""


def missing_extra(what: str, extra: str, error: ImportError) -> MissingFrameworkError:
    """The error for a package of an extra that is not installed."""
    package = (error.name or str(error)).partition(".")[0]
    return MissingFrameworkError(
        f'{what} needs {package}, which is not installed; install it with: pip install "flix-peft[{extra}]"'
    )
