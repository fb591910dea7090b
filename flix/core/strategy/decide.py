"""Which strategy computes a layer's sum: a pure function of facts that are known before it runs.

The strategies give the same numbers (docs/specification.md §5.5) at different costs. Gather copies each example's rank
rows and multiplies them in batches; masked multiplies everything with the rows of the batch's whole union; single
multiplies everything with one composition's. Gather's copies do not depend on the positions that share a row, and
masked's products grow with the union: so gather wins from some number of positions a row on, which falls as the
union grows over what one example uses. Those numbers were measured; ``table.json`` holds them and says where.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from flix.core.config.layout import LayerLayout
from flix.core.errors import ConfigError, listed

STRATEGIES = ("auto", "gather", "masked", "single", "fused")

_NEVER = float("inf")
_TRITON_DTYPES = ("float16", "bfloat16", "float32")


class Facts(NamedTuple):
    """What is known of a layer and a batch before it runs.

    Attributes:
        examples: rows of the routing, N.
        positions: positions of the input that share one row of the routing, S.
        rows: the most rank rows that one example uses, R.
        union: rank rows that the batch uses, U, or the most that it may use; None where even that is unknown.
        device: the class of devices, a key of the table: ``"torch-cpu"``.
        kept: of how many of the examples, those that are unlike, copies would be kept between calls, as between the
            tokens of a generation; 0 if nothing is kept.
        lacks: what the fused kernel lacks here, in words; None where it runs.
    """

    examples: int
    positions: int
    rows: int
    union: int | None
    device: str
    kept: int = 0
    lacks: str | None = None


def facts_of(
    layout: LayerLayout, width: int | None, examples: int, positions: int, device: str, **more: Any
) -> Facts:
    """The facts of a layer and a batch whose ids are not known, as while a program is traced.

    Args:
        layout: the layer's.
        width: the number of ids of a row; None where it is not known.
        examples, positions, device, more: see :class:`Facts`.
    """
    rows = layout.most(width)
    return Facts(examples, positions, rows, min(layout.rows, examples * rows), device, **more)


class Measured(NamedTuple):
    """What was measured on one class of devices; ``table.json`` says what each entry means."""

    device: str
    strategies: tuple[str, ...]
    when: str
    gather_from: tuple[tuple[float, float], ...]
    kept_copies: float
    union_unknown: float
    fused_from: float | None = None


class Decision(NamedTuple):
    """A strategy, and what it follows from.

    Attributes:
        strategy: the strategy to run.
        rule: ``"asked"``, ``"alone"`` (one example), ``"kernel"`` or ``"positions"``.
        facts: what was known.
        measured: the measurements that were gone by; None where none were needed.
        start: positions from which gather is faster, or the kernel; infinite where never.
    """

    strategy: str
    rule: str
    facts: Facts
    measured: Measured | None = None
    start: float = _NEVER

    @property
    def reason(self) -> str:
        """Why, in one line."""
        facts = self.facts
        if self.measured is None:
            return _SIMPLE[self.rule]
        if self.rule == "kernel":
            return f"the fused kernel is fastest from {self.start:g} positions a row on; here are {facts.positions}"
        union = "a union that is not known"
        if facts.union is not None:
            union = f"{facts.union} rank rows together, {facts.rows} in one example"
        when = "never" if self.start == _NEVER else f"from {self.start:g} positions a row on"
        reason = f"{union}: gather is faster {when}; here are {facts.positions}"
        if self.measured.device != facts.device:
            reason += f" (by {self.measured.device}: {facts.device} is not measured)"
        return reason


_SIMPLE = {
    "asked": "it was asked for",
    "alone": "there is one example, so one composition serves all",
}


def check_strategy(strategy: str) -> None:
    """Refuse an unknown strategy.

    Raises:
        ConfigError: no such strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")


def read_table(data: Mapping[str, Any]) -> dict[str, Measured]:
    """{class of devices: what was measured} from the JSON form.

    Raises:
        ConfigError: a device that leaves out gather, masked or single, or steps that do not rise.
    """
    table = {}
    for device, entry in data["devices"].items():
        dates: dict[str, str] = entry["measured"]
        steps = tuple(map(tuple, entry["gather_from"]))
        missing = {"gather", "masked", "single"} - set(dates)
        if missing or ("fused_from" in entry and "fused" not in dates):
            raise ConfigError(
                f"the table must say when each strategy was measured on {device!r}; missing: "
                f"{', '.join(sorted(missing)) or 'fused'}"
            )
        if list(steps) != sorted(steps):
            raise ConfigError(f"the steps of {device!r} must rise in the ratio, got {steps!r}")
        table[device] = Measured(
            device=device,
            strategies=tuple(dates),
            when=f"{max(dates.values())}, {entry['on']}",
            gather_from=steps,
            kept_copies=entry.get("kept_copies", 0),
            union_unknown=entry["union_unknown"],
            fused_from=entry.get("fused_from"),
        )
    return table


# Read at import: compilers that trace decide() take it as a constant.
TABLE = read_table(
    json.loads(resources.files(__package__).joinpath("table.json").read_text(encoding="utf-8"))
)


def decide(asked: str, facts: Facts, table: Mapping[str, Measured] = TABLE) -> Decision:
    """The strategy to run.

    ``"auto"`` takes only what was measured on the device, or, where nothing was, on its framework's CPU.

    Args:
        asked: what the user asked for; anything but ``"auto"`` is taken.
        facts: what is known of the layer and the batch.
        table: {class of devices: what was measured}.

    Raises:
        ConfigError: no such strategy, ``"fused"`` where it cannot run, or a framework that nobody measured.
    """
    check_strategy(asked)
    if asked == "fused" and facts.lacks is not None:
        raise ConfigError(
            f"strategy 'fused' needs {facts.lacks}; or use 'auto', 'gather' or 'masked'"
        )
    if asked != "auto":
        return Decision(asked, "asked", facts)
    measured = measured_on(facts.device, table)
    kernel = measured.fused_from
    runs = facts.lacks is None and not _few_copies(facts, measured)
    if kernel is not None and runs and facts.positions >= kernel:
        return Decision("fused", "kernel", facts, measured, kernel)
    if facts.examples == 1:  # other rows cannot be known to be alike
        return Decision("single", "alone", facts)
    start = _gather_from(facts, measured)
    strategy = "gather" if facts.positions >= start else "masked"
    return Decision(strategy, "positions", facts, measured, start)


def triton_lacks(device: str, dtype: str, *, triton: bool, interpreted: bool) -> str | None:
    """What kernels written in Triton lack on a device for a dtype, in words; None where they run.

    Args:
        device: ``"cpu"``, ``"cuda"``, ...
        dtype: of the input.
        triton: whether Triton is installed.
        interpreted: whether its interpreter is switched on.
    """
    if not triton:
        return "Triton, which is not installed: pip install triton"
    if device != "cuda" and not (interpreted and device == "cpu"):
        return (
            f"a CUDA device, but the input is on {device!r} (Triton's interpreter, switched on by "
            "TRITON_INTERPRET=1, serves to test on a CPU)"
        )
    if dtype not in _TRITON_DTYPES:
        return f"an input of {', '.join(_TRITON_DTYPES)}, got {dtype}"
    return None


def measured_on(device: str, table: Mapping[str, Measured] = TABLE) -> Measured:
    """What a device goes by: its own measurements, or where there are none those of its framework's CPU.

    Raises:
        ConfigError: neither was measured.
    """
    found = table.get(device)
    if found is None:
        framework = device.partition("-")[0]
        found = table.get(f"{framework}-cpu")
        if found is None:
            raise ConfigError(
                f"nothing was measured on {device!r}, nor on {framework}-cpu; measured: {listed(table)}"
            )
        # A kernel that is fast on one class of devices says nothing of another.
        found = found._replace(fused_from=None)
    return found


def _few_copies(facts: Facts, measured: Measured) -> bool:
    """Whether copies are kept between calls, and few: nothing is faster than what is copied already."""
    if not facts.kept or facts.union is None:
        return False
    return facts.kept * facts.rows <= measured.kept_copies * facts.union


def _gather_from(facts: Facts, measured: Measured) -> float:
    """Positions a row from which gather is faster than masked."""
    if facts.union is None:
        return measured.union_unknown
    start = _NEVER
    if facts.kept:
        return facts.positions if _few_copies(facts, measured) else _NEVER
    for ratio, positions in measured.gather_from:
        if facts.union >= ratio * facts.rows:
            start = positions
    return start
