"""Kernels of experts in PEFT's files (``target_parameters``): a pair for each expert (docs/specification.md §1.4).

PEFT nests one wrapper for each such parameter of a module, the last one outermost, and names tensors by the nesting,
not by the parameter; which is whose follows from the order in which modules hold their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from flix.core.errors import AdapterError, listed
from flix.core.peft.exporting import unpacked_experts

Parts = dict[str, NDArray[Any]]
_ORDER = ("gate_up_proj", "up_proj", "down_proj")  # as modules of experts hold them
_INSIDE = ".base_layer"


def with_experts(
    found: Mapping[str, Parts], targets: Sequence[str], rank_of: Callable[[str], float], where: str
) -> dict[str, Parts]:
    """The factors by layer, those of experts by their parameter's path.

    Args:
        found: A and B by the path that the file has.
        targets: ``target_parameters``.
        rank_of: the rank of a layer or parameter, by its path.
        where: the folder, for messages.

    Returns:
        A ``[E, r, d_in]`` and B ``[E, d_out, r]`` of experts; others as they are.

    Raises:
        AdapterError: factors of which it is not known to which parameter they belong, or of other sizes.
    """
    nested: dict[str, dict[int, str]] = {}
    for path in found:
        module, depth = path, 0
        while module.endswith(_INSIDE):
            module, depth = module.removesuffix(_INSIDE), depth + 1
        nested.setdefault(module, {})[depth] = path
    made: dict[str, Parts] = {}
    told: dict[str, set[str]] = {}
    for target in targets:
        holder, _, name = target.rpartition(".")
        told.setdefault(holder, set()).add(name)
    for module, own in nested.items():
        named = set[str]().union(*(told.get(ending, ()) for ending in _endings(module)))
        plain = [*own] == [0] and len(found[own[0]].get("A", ())) == rank_of(module)
        if not named or plain:
            made.update((path, found[path]) for path in own.values())
            continue
        known = len(named) == 1 or named <= {*_ORDER}
        if not known or sorted(own) != [*range(len(named))]:
            raise AdapterError(
                f"{where}: {module!r} has the factors of {len(own)} parameters, and target_parameters names "
                f"{listed(sorted(named))}: it is not known which are whose"
            )
        ordered = sorted(named, key=lambda name: _ORDER.index(name) if name in _ORDER else 0)
        for depth, name in enumerate(reversed(ordered)):
            path = f"{module}.{name}"
            made[path] = _unpacked(found[own[depth]], rank_of(path), f"{where}: layer {path!r}")
    return made


def _endings(module: str) -> list[str]:
    """The names that may stand for a module in a target: none, the last of its path, the last two, ..."""
    parts = module.split(".")
    return ["", *(".".join(parts[start:]) for start in range(len(parts)))]


def _unpacked(parts: Parts, rank: float, what: str) -> Parts:
    a, b = parts.get("A"), parts.get("B")
    fits = a is not None and b is not None and a.ndim == b.ndim == 2
    if not fits or a.shape[0] != b.shape[1] or a.shape[0] % int(rank):  # type: ignore[union-attr]
        got = {part: list(t.shape) for part, t in parts.items()}
        raise AdapterError(
            f"{what} needs lora_A [experts * r, d_in] and lora_B [d_out, r * experts] with r = {int(rank)}, got {got}"
        )
    if a.shape[0] == int(rank):  # type: ignore[union-attr]
        raise AdapterError(
            f"{what} is no kernel with an axis of experts, but one matrix, and bare parameters of that form are no layers"
        )
    return dict(zip("AB", unpacked_experts(a, b, int(rank)), strict=True))  # type: ignore[arg-type]
