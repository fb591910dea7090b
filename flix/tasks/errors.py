"""Errors of data and of base models that users can mend; the command line turns them into one line and exit code 2."""

from __future__ import annotations

from flix.core.errors import FlixError
from flix.data.errors import DataError, missing_extra

__all__ = ["DataError", "ModelError", "missing_extra"]


class ModelError(FlixError, ValueError):
    """A base model or tokenizer that cannot be loaded, or that cannot do what it is asked to do."""
