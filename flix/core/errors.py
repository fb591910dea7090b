"""Errors of flix, and the small helpers that make their messages useful.

Every message states the rule, what was got, and the valid choices; features, layers and rows are named
by name. All of them derive from :class:`FlixError`, and all but :class:`MissingFrameworkError`
and errors of training from ``ValueError``.
"""

from __future__ import annotations

import difflib
import sys
import unicodedata
import warnings
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING


class FlixError(Exception):
    """Base of every error that flix raises on purpose."""

    if not TYPE_CHECKING:
        # Plainly Exception's constructor is one that TensorFlow's autograph can raise again as the same class.
        __init__ = Exception.__init__


class FeatureError(FlixError, ValueError):
    """An unknown, duplicate or ill-formed feature or group."""


class RoutingError(FlixError, ValueError):
    """Routing (ids and weights) that does not fit its rules, its registry or the batch."""


class RankError(FlixError, ValueError):
    """Ranks that break a rule, or a rank budget that cannot be met."""


class TrainingError(FlixError, RuntimeError):
    """A training that cannot go on."""


class RunError(FlixError, ValueError):
    """An output folder that does not fit what is asked of it."""


class SettingsError(FlixError, ValueError):
    """A configuration file that cannot be read, or that breaks a rule."""


class ConfigError(FlixError, ValueError):
    """A configuration with a value out of its range."""


class TargetError(ConfigError):
    """Target patterns that match nothing, or match a layer that cannot be adapted."""


class AdapterError(FlixError, ValueError):
    """An adapter file that is damaged, or that does not fit the model."""


class MissingFrameworkError(FlixError, ImportError):
    """A framework that is not installed, or whose release is too old."""


def listed(choices: Iterable[object], limit: int = 20) -> str:
    """The choices as readable text, cut after ``limit`` entries."""
    items = [str(choice) for choice in choices]
    if not items:
        return "none"
    more = f", ... ({len(items)} in all)" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


# Comparing texts costs time that grows with their lengths' product: what is longer is not compared.
_LONGEST, _MOST = 100, 10_000


def near(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """``" (did you mean ...?)"`` for the choices that look like ``name``, or an empty string."""
    wanted = str(name)
    if len(wanted) > _LONGEST:
        return ""
    some = [c for c in islice(map(str, choices), _MOST) if len(c) <= _LONGEST]
    matches = [c for c in some if _plainly(c) == _plainly(wanted)][:limit]
    matches = matches or difflib.get_close_matches(wanted, some, n=limit, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(m) for m in matches)}?)" if matches else ""


def _plainly(text: str) -> str:
    """A text without case and compatibility, which are all that many mistypings are."""
    return unicodedata.normalize("NFKC", text).casefold()


def shown(value: object, limit: int = 200) -> str:
    """A value as a message shows it: its ``repr``, cut, whatever it is."""
    try:
        text = repr(value)
    except Exception:
        # An int of too many digits, a list that nests too deeply, a class of the caller's.
        return f"something of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def warn(text: str) -> None:
    """Warn the code that called flix, however deep in flix the reason was found."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _ours(frame.f_globals.get("__name__")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _ours(module: object) -> bool:
    return str(module).partition(".")[0] == "flix"
