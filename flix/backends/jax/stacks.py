"""Layers that one module stacks for ``nnx.scan`` or ``nnx.vmap``: what each is called, and its own part of the tables.

Such a module's kernel has axes in front, one entry a layer. Outside of the module each layer is one by itself, with a
path of its own as in the model whose layers are not stacked (``layers.2.linear``), so that configurations and files
serve both. Tables have the kernel's axes in front, and so one layout: a feature's rank in a layer is that in all layers
of its stack.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from flix.backends.jax.layers import FlixLayer, adaptable, lead_of
from flix.backends.jax.parameters import Bank, LayerBank, LayerSpec
from flix.core.errors import ConfigError, TargetError, listed


@dataclass(frozen=True)
class Place:
    """Where a layer is.

    Attributes:
        module: the module, which is the layer or a stack of it and others.
        index: which one of the stack; empty for a layer by itself.
        stack: the paths of all layers of the stack; empty likewise.
        lead: the axes of the stack.
    """

    module: Any
    index: tuple[int, ...] = ()
    stack: tuple[str, ...] = ()
    lead: tuple[int, ...] = ()


def places(model: nnx.Module) -> dict[str, Place]:
    """Every module below a model by its path; those that are stacks, by the paths of their layers."""
    modules = {".".join(map(str, path)): m for path, m in nnx.iter_modules(model) if path}
    leads = {path: lead for path, m in modules.items() if (lead := _lead(m)) is not None}
    shared, found = _shared(leads), dict[str, Place]()
    for path, module in modules.items():
        lead = leads.get(path) or ()
        shape, _ = adaptable(module)
        if isinstance(module, FlixLayer):
            lead, stack = module.flix_spec.lead, module.flix_spec.stack
        elif shape is not None and lead:
            stack = _names(path, lead, shared, modules)
        else:
            found[path] = Place(module)
            continue
        indices = itertools.product(*map(range, lead))
        own = zip(indices, stack, strict=True) if stack else [((), path)]
        found.update({name: Place(module, index, stack, lead) for index, name in own})
    return found


def depth_of(model: nnx.Module) -> int:
    """How many axes in front all layers of a model share: then the model itself may be what ``scan`` takes apart."""
    modules = {".".join(map(str, path)): m for path, m in nnx.iter_modules(model)}
    leads = {path: lead for path, m in modules.items() if (lead := _lead(m)) is not None}
    return len(_shared(leads).get("", ()))


def _lead(module: nnx.Module) -> tuple[int, ...] | None:
    """The axes that a module's own parameters have in front; of an unknown one, all that there may be."""
    shape, _ = adaptable(module)
    if shape is not None:
        return lead_of(module, shape)
    own = [tuple(v.shape) for v in vars(module).values() if isinstance(v, nnx.Param)]
    if not own:
        return None
    known = isinstance(vars(module).get("num_features"), int)  # a norm, of vectors
    return _common([size[:-1] if known else size for size in own])


def _common(leads: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What tuples begin with, all of them."""
    found = itertools.takewhile(lambda sizes: len({*sizes}) == 1, zip(*leads, strict=False))
    return tuple(sizes[0] for sizes in found)


def _shared(leads: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The axes in front that all parameters at or below a path have."""
    below: dict[str, list[tuple[int, ...]]] = {}
    for path, lead in leads.items():
        parts = path.split(".")
        for above in {"", path, *(".".join(parts[:i]) for i in range(1, len(parts)))}:
            below.setdefault(above, []).append(lead)
    return {path: _common(found) for path, found in below.items()}


def _names(
    path: str,
    lead: tuple[int, ...],
    shared: Mapping[str, tuple[int, ...]],
    modules: Mapping[str, nnx.Module],
) -> tuple[str, ...]:
    """The paths of a stack's layers: the number of each stands behind the module that was stacked.

    flax does not say which that was. It is taken to be the topmost below the model all of whose parameters have the
    axis. Where that has nothing but one module, which has nothing else, ..., it is the last of them in the plural
    (``encoder.layers``), or the last that is no layer itself.
    """
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    roots, first = list[int](), 0
    for axis in range(len(lead)):
        within = [
            i for i, name in enumerate(above)
            if len(shared[name]) > axis and not isinstance(modules[name], nnx.List | nnx.Dict)
        ]  # fmt: skip
        first = _root([i for i in within if i >= first], above, shared)
        roots.append(first)
    names = []
    for index in itertools.product(*map(range, lead)):
        named = [
            (part, *(str(k) for k, root in zip(index, roots, strict=True) if root == i))
            for i, part in enumerate(parts)
        ]
        names.append(".".join(itertools.chain.from_iterable(named)))
    return tuple(names)


def _root(
    within: Sequence[int], above: Sequence[str], shared: Mapping[str, tuple[int, ...]]
) -> int:
    """Which of the modules on the way to a layer was stacked, of those that may be, by their numbers."""
    chain = [within[0]]
    for i in within[1:]:
        head = above[chain[-1]] + "."
        if i != chain[-1] + 1 or {p[len(head) :].partition(".")[0] for p in shared if p.startswith(head)} != {
            above[i][len(head) :]
        }:  # fmt: skip
            break
        chain.append(i)
    plural = [i for i in chain if above[i].endswith("s")]
    inner = [i for i in chain if i + 1 < len(above)]
    return (plural or inner or chain)[-1]


def whole(found: Mapping[str, Place], paths: Sequence[str]) -> dict[str, list[str]]:
    """Layers by the first of their stack, in the stack's order; those by themselves by their own path.

    Raises:
        TargetError: some layers of a stack without the others.
    """
    chosen, groups = {*paths}, dict[str, list[str]]()
    for path in paths:
        stack = found[path].stack or (path,)
        if left := [name for name in stack if name not in chosen]:
            raise TargetError(
                f"layer {path!r} is one of a stack of {len(stack)}, which has one pair of tables for all; {listed(left, 3)} "
                "would be left out. Let target_modules name all layers of a stack, or none"
            )
        groups[stack[0]] = [*stack]
    return groups


def members(spec: LayerSpec) -> list[LayerSpec]:
    """The specs of a stack's layers; of a layer by itself, its own."""
    if not spec.stack:
        return [spec]
    return [replace(spec, path=path, lead=(), stack=()) for path in spec.stack]


def unstacked(bank: LayerBank) -> Bank:
    """The layers of a stack, each by itself."""
    specs = members(bank.spec)
    if not bank.spec.stack:
        return {bank.spec.path: bank}
    indices = itertools.product(*map(range, bank.spec.lead))
    return {
        spec.path: LayerBank(bank.A[index], bank.B[index], spec)
        for spec, index in zip(specs, indices, strict=True)
    }


def stacked(path: str, lead: tuple[int, ...], banks: Sequence[LayerBank]) -> LayerBank:
    """Layers as one bank; arguments as for :func:`together`.

    Raises:
        ConfigError: layers whose features differ in rank or scale.
    """
    spec = together(path, lead, [bank.spec for bank in banks])
    if not lead:
        return banks[0]
    a, b = (
        jnp.stack(tables).reshape(*lead, *tables[0].shape)
        for tables in zip(*((bank.A, bank.B) for bank in banks), strict=True)
    )
    return LayerBank(a, b, spec)


def together(path: str, lead: tuple[int, ...], specs: Sequence[LayerSpec]) -> LayerSpec:
    """The spec of a stack of layers.

    Args:
        path: the stack's, for messages.
        lead: its axes; empty for a layer by itself, whose own spec it is.
        specs: the layers', in the stack's order.

    Raises:
        ConfigError: layers whose features differ in rank or scale.
    """
    if not lead:
        return specs[0]
    check_alike(specs)
    return replace(specs[0], path=path, lead=lead, stack=tuple(spec.path for spec in specs))


def check_alike(specs: Sequence[LayerSpec]) -> None:
    """Refuse layers of one stack whose features have other ranks or scales.

    Raises:
        ConfigError: they have; the first feature, and two layers, are named.
    """
    first = specs[0]
    for spec in specs[1:]:
        if spec.layout == first.layout:
            continue
        pairs = [tuple(zip(s.layout.ranks, s.layout.scales, strict=True)) for s in (first, spec)]
        number = next(i for i, (one, two) in enumerate(zip(*pairs, strict=True)) if one != two)
        group, name = first.registry.features[number]
        (rank, scale), (other, others) = pairs[0][number], pairs[1][number]
        raise ConfigError(
            f"layers {first.path!r} and {spec.path!r} are of one stack, whose tables have one layout for all layers, but "
            f"feature {group}={name} has rank {rank} (scale {scale:g}) in one and {other} ({others:g}) in the other; let "
            "rank_pattern and alpha_pattern give all layers of a stack the same, or do not stack them"
        )
