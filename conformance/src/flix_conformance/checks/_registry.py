"""What a check is, and the list of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flix_conformance.strategies import Draw

CHECKS: dict[str, Check] = {}


class NotOffered(Exception):  # noqa: N818 - no error: the report says so
    """The backend does not offer what a check is about (embeddings, say)."""


@dataclass(frozen=True)
class Check:
    """One rule.

    Attributes:
        name: as in reports and in files of expected failures.
        rule: the rule, in words.
        run: the check on one example: ``run(draw, backend)``, or ``run(draw, first, second)`` for pairs.
        examples: how many examples, under the profile ``ci``.
        pair: whether it compares two backends.
        kind: the kind of layer that it needs.
        needs: optional methods of the harness that it needs.
        strategy: a strategy that it is about.
        uses: abilities that it needs: "gradients", "training", "merge", "files", "changes".
        dtype: a dtype that it is about, if it is about one.
        core: an optional method of the harness; where it is not there, the check runs the core's code alone.
    """

    name: str
    rule: str
    run: Callable[..., None]
    examples: int
    pair: bool = False
    kind: str = "linear"
    needs: tuple[str, ...] = ()
    strategy: str = "auto"
    uses: tuple[str, ...] = ()
    core: str | None = None
    dtype: str | None = None


def check(
    rule: str,
    *,
    examples: int = 20,
    pair: bool = False,
    kind: str = "linear",
    needs: tuple[str, ...] = (),
    strategy: str = "auto",
    uses: tuple[str, ...] = (),
    core: str | None = None,
    dtype: str | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a check under its own name."""

    def register(run: Callable[..., None]) -> Callable[..., None]:
        name = run.__name__
        CHECKS[name] = Check(
            name, rule, run, examples, pair, kind, needs, strategy, uses, core, dtype
        )
        return run

    return register


def offered(chosen: Check, *backends: Any) -> None:
    """Stop a check that the backends do not all offer the kind of layer or the methods for."""
    if any(chosen.kind not in backend.kinds for backend in backends):
        raise NotOffered(f"no {chosen.kind} layers")
    if any(chosen.strategy not in backend.strategies for backend in backends):
        raise NotOffered(f"no strategy {chosen.strategy!r}")
    if any(chosen.dtype not in (None, *backend.dtypes) for backend in backends):
        raise NotOffered(f"no layers in {chosen.dtype}")
    for backend in backends:
        if absent := [ability for ability in chosen.uses if ability in backend.absent]:
            raise NotOffered(f"{backend.name} declares {', '.join(absent)} absent")
        if missing := backend.lacks(chosen.needs):
            raise NotOffered(f"the harness has no {', '.join(missing)}")


def any_kind(draw: Draw, kinds: tuple[str, ...]) -> str:
    """One of the kinds that are offered."""
    return str(draw.one_of(sorted(kinds, reverse=True)))
