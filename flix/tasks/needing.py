"""Packages that training and evaluation need."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec

from flix.core.errors import FlixError, MissingFrameworkError
from flix.tasks.errors import missing_extra


def need(what: str, trackers: Sequence[str] = ()) -> None:
    """Ask for the packages of the extra ``train``, and for trackers, now and not when they are needed.

    Raises:
        MissingFrameworkError: one is not installed.
    """
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise MissingFrameworkError(
                f"training.report_to: {tracker} is not installed; install it with: pip install {tracker}"
            )
    for package in ("sacrebleu", "torch", "transformers", "accelerate", "yaml"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            if isinstance(error, FlixError):
                raise
            raise missing_extra(what, "train", error) from None
