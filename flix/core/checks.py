"""Checks of single values. A bool is not a number here, although Python counts it as one; NumPy's numbers are."""

from __future__ import annotations

import math

import numpy as np

from flix.core.errors import ConfigError, FlixError, shown


def is_whole(value: object) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number; infinities and NaN are."""
    return is_whole(value) or isinstance(value, float | np.floating)


def whole(
    value: object, what: str, least: int | None = None, error: type[FlixError] = ConfigError
) -> int:
    """``value`` as a whole number.

    Args:
        value: what was given.
        what: its name, for the message.
        least: the smallest number allowed; None: any.
        error: the class of the error.

    Raises:
        FlixError: another thing, or less than ``least``; of the class ``error``.
    """
    if not is_whole(value) or (least is not None and value < least):  # type: ignore[operator]
        more = "" if least is None else f" of {least} or more"
        raise error(f"{what} must be a whole number{more}, got {shown(value)}")
    return int(value)  # type: ignore[call-overload,no-any-return]


def finite(
    value: object, what: str, error: type[FlixError] = ConfigError, *, positive: bool = False
) -> float:
    """``value`` as a finite float.

    Args:
        value: what was given.
        what: its name, for the message.
        error: the class of the error.
        positive: refuse 0 and less, too.

    Raises:
        FlixError: another thing, or out of range; of the class ``error``.
    """
    number = _float(value)
    if not math.isfinite(number) or (positive and number <= 0):
        kind = "positive" if positive else "finite"
        raise error(f"{what} must be a {kind} number, got {shown(value)}")
    return number


def rate(value: object, what: str, *, below_one: bool = False) -> float:
    """``value`` as a dropout rate, from 0 to 1.

    Args:
        value: what was given.
        what: its name, for the message.
        below_one: refuse 1, too.

    Raises:
        ConfigError: another thing, or out of range.
    """
    number = _float(value)
    if not 0.0 <= number <= 1.0 or (below_one and number == 1.0):
        until = "0 up to, not including, 1" if below_one else "0 to 1"
        raise ConfigError(f"dropout rate {what} must be a number from {until}, got {shown(value)}")
    return number


def _float(value: object) -> float:
    """A number as a float, NaN for another thing; whole numbers beyond every float are infinite."""
    if not is_number(value):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf
