"""Errors of a run that its user can mend; the command line turns them into one line and exit code 2."""

from __future__ import annotations

from flix.core.errors import RunError, SettingsError
from flix.data.errors import DataError, missing_extra
from flix.tasks.errors import ModelError

__all__ = ["DataError", "ModelError", "RunError", "SettingsError", "missing_extra"]
