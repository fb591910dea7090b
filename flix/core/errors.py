"""Errors of flix, and the small helpers that make their messages useful.

Every message states the rule, what was got, and the valid choices; features, layers and rows are named
by name. All of them derive from :class:`FlixError`, and (but for the missing framework) from ``ValueError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
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


class ConfigError(FlixError, ValueError):
    """A configuration with a value out of its range."""


class TargetError(ConfigError):
    """Target patterns that match nothing, or match a layer that cannot be adapted."""


class AdapterError(FlixError, ValueError):
    """An adapter file that is damaged, or that does not fit the model at hand."""


class MissingFrameworkError(FlixError, ImportError):
    """A backend whose framework is not installed."""


def listed(choices: Iterable[object], limit: int = 20) -> str:
    """The choices as readable text, cut after ``limit`` entries."""
    items = [str(choice) for choice in choices]
    if not items:
        return "none"
    more = f", ... ({len(items)} in all)" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def near(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """``" (did you mean ...?)"`` for the choices that look like ``name``, or an empty string."""
    matches = difflib.get_close_matches(str(name), [str(c) for c in choices], n=limit, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(m) for m in matches)}?)" if matches else ""
