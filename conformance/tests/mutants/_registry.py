"""Deliberately broken backends, made from the example: each breaks one rule, and names the check that must see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flix_conformance import Backend
from flix_numpy import Harness, Layer


@dataclass(frozen=True)
class Mutant:
    """A broken backend.

    Attributes:
        name: what is wrong, in words.
        check: the check that must catch it.
        harness: the broken one.
    """

    name: str
    check: str
    harness: type[Harness]

    def backend(self) -> Backend:
        """The backend that the kit gets."""
        return Backend("mutant", self.harness())


MUTANTS: list[Mutant] = []


def mutant(name: str, check: str) -> Callable[[type[Any]], type[Any]]:
    """Register a broken harness, or a harness with a broken layer."""

    def register(cls: type[Any]) -> type[Any]:
        harness = cls
        if issubclass(cls, Layer):
            harness = type(cls.__name__, (Harness,), {"layer": cls})
        MUTANTS.append(Mutant(name, check, harness))
        return cls

    return register


class ChangedGradients(Layer):
    """A layer whose gradients are changed."""

    def change(self, found: dict[str, Any], x: Any, dy: Any) -> None:
        raise NotImplementedError

    def backward(self, x: Any, ids: Any, weights: Any, dy: Any) -> Any:
        found = super().backward(x, ids, weights, dy)
        self.change(found, x, dy)
        return found
