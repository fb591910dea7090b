"""Rank rules (SPEC §3); the public name of :mod:`flix.core.ranks`."""

from flix.core.ranks import (
    Ranks,
    Rule,
    by_group,
    compute_matched,
    explicit,
    parameter_matched,
    proportional,
    uniform,
)

__all__ = [
    "Ranks",
    "Rule",
    "by_group",
    "compute_matched",
    "explicit",
    "parameter_matched",
    "proportional",
    "uniform",
]
