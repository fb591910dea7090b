"""Deliberately broken backends, made from the example: each breaks one rule, and names the check that must see it."""

from mutants import (
    conduct,
    cross,
    exchange,
    experts,
    isolation,
    layers,
    lifecycle,
    outputs,
    routing,
    runs,
    search,
    sizes,
    training,
    uses,
    ways,
)
from mutants._registry import MUTANTS, Mutant

__all__ = [
    "MUTANTS",
    "Mutant",
    "conduct",
    "cross",
    "exchange",
    "experts",
    "isolation",
    "layers",
    "lifecycle",
    "outputs",
    "routing",
    "runs",
    "search",
    "sizes",
    "training",
    "uses",
    "ways",
]
