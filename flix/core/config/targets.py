"""Which layers are adapted: PEFT's meaning of target patterns, as pure functions (docs/specification.md §4.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

from flix.core.config.patterns import compiled, exactly
from flix.core.errors import TargetError, listed, near

ALL_LINEAR = "all-linear"
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""What PEFT calls the starts that change the base's kernels."""
Patterns = Union[str, Sequence[str]]

HEADS = frozenset(
    (
        "classifier",
        "cls",
        "embed_out",
        "head",
        "lm_head",
        "logits",
        "predictions",
        "qa_outputs",
        "score",
    )
)
"""What models call their output heads, where their framework has no way of its own to tell them."""


@dataclass(frozen=True)
class LayerInfo:
    """What a backend says of one layer of a model.

    Attributes:
        path: the layer's dotted path.
        kind: ``"linear"``, ``"embedding"``, or ``""`` for a layer that cannot be adapted.
        d_in: the input size (of an embedding: the vocabulary's).
        d_out: the output size.
        head: an output head, which "all-linear" leaves out: what the framework tells, or :func:`is_head`.
        reason: why a layer cannot be adapted.
        lookup: a layer like an embedding, which "all-linear" does not speak of.
        experts: the size of the kernel's axis of experts; 0 where it has none.
        active: how many experts a token is sent to.
        named: a layer that is adapted only where it is named, as convolutions are in PEFT: not under "all-linear".
    """

    path: str
    kind: str
    d_in: int = 0
    d_out: int = 0
    head: bool = False
    reason: str = ""
    lookup: bool = False
    experts: int = 0
    active: int = 1
    named: bool = False


def is_head(path: str) -> bool:
    """Whether a layer is an output head by its name: the first or the last part of its path is one of ``HEADS``."""
    parts = path.split(".")
    return parts[0] in HEADS or parts[-1] in HEADS


def matches(path: str, patterns: Patterns) -> bool:
    """Whether a path matches: a string is a regular expression for the whole path, a list holds suffixes.

    A suffix matches whole path components: ``"q"`` matches ``layers.0.q`` but not ``layers.0.seq``.

    Raises:
        ConfigError: a pattern that is none, or that breaks a rule of :mod:`flix.core.config.patterns`.
    """
    if isinstance(patterns, str):
        return compiled(patterns, "the pattern")(path)
    return any(path == suffix or path.endswith("." + suffix) for suffix in patterns)


def select(
    layers: Sequence[LayerInfo], targets: Patterns, excluded: Patterns = ()
) -> tuple[LayerInfo, ...]:
    """The layers to adapt, in the model's order.

    Args:
        layers: all layers of the model.
        targets: ``"all-linear"`` (every linear layer but output heads), a regular expression, or suffixes.
        excluded: layers to leave out, in the same forms (no ``"all-linear"``).

    Raises:
        TargetError: nothing matches (with near matches), a suffix that matches no layer, or a named layer that
            cannot be adapted.
    """
    if targets == ALL_LINEAR:
        chosen = [i for i in layers if i.kind == "linear" and not (i.head or i.named)]
    else:
        chosen = [info for info in layers if matches(info.path, targets)]
        if not isinstance(targets, str):
            for suffix in targets:
                if not any(matches(info.path, [suffix]) for info in layers):
                    _refuse_unmatched(suffix, layers)
        if isinstance(targets, str) and not chosen:
            _refuse_unmatched(targets, layers)
    if excluded:
        chosen = [info for info in chosen if not matches(info.path, excluded)]
    adaptable = [info for info in chosen if info.kind]
    if chosen and not adaptable:
        info = chosen[0]
        raise TargetError(
            f"target_modules={_shown(targets)} names {info.path!r}, which cannot be adapted: "
            f"{info.reason or 'it is neither linear nor an embedding'}"
        )
    if not isinstance(targets, str):
        # A list is meant layer by layer; a regular expression may also catch containers and norms.
        for info in chosen:
            if not info.kind:
                raise TargetError(
                    f"target_modules={_shown(targets)} names {info.path!r}, which cannot be adapted: "
                    f"{info.reason or 'it is neither linear nor an embedding'}"
                )
    else:
        for info in chosen:
            if not info.kind and info.reason and targets != ALL_LINEAR:
                raise TargetError(
                    f"target_modules={_shown(targets)} matches {info.path!r}, which cannot be "
                    f"adapted: {info.reason}"
                )
    if not adaptable:
        raise TargetError(
            f"target_modules={_shown(targets)} with exclude_modules={_shown(excluded)} leaves no "
            f"layer to adapt; layers that can be adapted: {listed(_adaptable(layers))}"
            + (f"; left out: {said}" if (said := left_out(layers, targets, excluded)) else "")
        )
    return tuple(adaptable)


def left_out(layers: Sequence[LayerInfo], targets: Patterns, excluded: Patterns = ()) -> str:
    """What "all-linear" leaves out although nobody asked for it, with the reasons; empty where there is nothing to say.

    Args:
        layers, targets, excluded: as :func:`select` takes them.
    """
    if targets != ALL_LINEAR:
        return ""
    reasons: dict[str, list[str]] = {}
    for info in layers:
        passed_over = info.reason and not (info.kind or info.head or info.lookup or info.named)
        if passed_over and not (excluded and matches(info.path, excluded)):
            reasons.setdefault(info.reason, []).append(info.path)
    said = (
        repr(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "") + f" ({reason})"
        for reason, paths in reasons.items()
    )
    return "; ".join(said)


def _adaptable(layers: Sequence[LayerInfo]) -> list[str]:
    return [info.path for info in layers if info.kind]


def _refuse_unmatched(pattern: str, layers: Sequence[LayerInfo]) -> None:
    paths = _adaptable(layers)
    tails = {path.rsplit(".", 1)[-1] for path in paths}
    raise TargetError(
        f"target_modules: {pattern!r} matches no layer{near(pattern, [*tails, *paths])}; "
        f"layers that can be adapted: {listed(paths)}"
    )


def _shown(patterns: Patterns) -> str:
    return repr(patterns if isinstance(patterns, str) else list(patterns))


__all__ = [
    "ALL_LINEAR", "CHANGES_BASE", "HEADS", "LayerInfo", "Patterns", "exactly", "is_head", "left_out", "matches",
    "select",
]  # fmt: skip
