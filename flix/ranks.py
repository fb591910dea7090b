"""Rank rules (docs/specification.md §3); the public name of :mod:`flix.core.config.ranks`."""

from flix.core.config.ranks import (
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
