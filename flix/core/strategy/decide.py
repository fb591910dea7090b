"""Which strategy computes a layer's sum: a pure function of static facts and a table of measured costs.

The strategies give the same numbers at different costs (docs/specification.md §5.5). Gather copies each example's rows
and multiplies them in batches; masked multiplies everything with the batch's whole union of rows; single multiplies
everything with one composition's. What a strategy adds to the frozen layer is modelled as

    seconds = start + example * N + moved * V + product * M

with N examples, V values of A and B that are moved (copied for examples, stacked for the union) and M multiply-adds of
the low-rank products. The four coefficients of each strategy are fitted to measurements on a class of devices
(``flix bench calibrate``); the table of those that were measured is in this package.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from flix.core.config.layout import check_strategy
from flix.core.errors import ConfigError, listed

# See _with_kernel: examples of one position, and unions in multiples of what one example uses.
_MANY_EXAMPLES, _SHARED = 256, 16
PLANNED = ("gather", "masked", "single")
TERMS = ("start", "example", "moved", "product")


@dataclass(frozen=True)
class Facts:
    """What is known of a layer and a batch before it runs.

    Attributes:
        examples: rows of the routing, N.
        tokens: positions of the input that share one row of the routing, S.
        rows: the most rank rows that one example uses, R.
        union: rank rows that the batch uses, U; where ids are not known on the host, the most it may use.
        d_in, d_out: the layer's sizes; of an embedding, whose A is looked up in every strategy, 0 and d_out.
        device: the class of devices, a key of the calibration: ``"torch-cpu"``.
        fused: whether the backend has a fused kernel for this device and dtype.
        stacked: whether the union is stacked already, from the step before, so that masked moves nothing.
    """

    examples: int
    tokens: int
    rows: int
    union: int
    d_in: int
    d_out: int
    device: str
    fused: bool = False
    stacked: bool = False

    def terms(self, strategy: str) -> tuple[float, float, float, float]:
        """(1, N, V, M) of a strategy, which the coefficients multiply."""
        width = self.d_in + self.d_out
        used = self.union if strategy == "masked" else self.rows
        # Gather's gradients are summed over the union.
        moved = self.examples * used + self.union if strategy == "gather" else used
        if strategy == "masked" and self.stacked:
            moved = 0
        products = self.examples * self.tokens * used * width
        return 1.0, float(self.examples), float(moved * width), float(products)


@dataclass(frozen=True)
class Calibration:
    """Measured costs of the strategies on one class of devices.

    Attributes:
        device: the class.
        seconds: {strategy: coefficient of each of ``TERMS``}.
        measured: when and on what, in words.
    """

    device: str
    seconds: Mapping[str, tuple[float, ...]]
    measured: str = ""

    def __post_init__(self) -> None:
        for strategy in PLANNED:
            found = self.seconds.get(strategy)
            if found is None or len(found) != len(TERMS) or not all(c >= 0 for c in found):
                raise ConfigError(
                    f"a calibration gives {', '.join(TERMS)} (0 or more) for each of {', '.join(PLANNED)}; "
                    f"{self.device!r} has {found!r} for {strategy!r}"
                )

    def estimate(self, facts: Facts, strategy: str) -> float:
        """Seconds that a strategy adds to the frozen layer's forward and backward."""
        terms = facts.terms(strategy)
        return sum(c * t for c, t in zip(self.seconds[strategy], terms, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "measured": self.measured,
            "seconds": {s: dict(zip(TERMS, self.seconds[s], strict=True)) for s in PLANNED},
        }


@dataclass(frozen=True)
class Decision:
    """A strategy, and why.

    Attributes:
        strategy: the strategy to run.
        reason: why, in one line.
        seconds: what each strategy was estimated to add to the frozen layer.
    """

    strategy: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)


def calibrations_from(data: Mapping[str, Any]) -> dict[str, Calibration]:
    """{device: calibration} from the JSON form.

    Raises:
        ConfigError: not of that form.
    """
    found = {}
    for device, entry in data.items():
        try:
            seconds = {s: tuple(float(entry["seconds"][s][t]) for t in TERMS) for s in PLANNED}
            found[device] = Calibration(device, seconds, str(entry.get("measured", "")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"a calibration of {device!r} gives seconds for {', '.join(PLANNED)}, each with "
                f"{', '.join(TERMS)}; {error!r} is missing or no number"
            ) from error
    return found


def read_calibrations(path: Path) -> dict[str, Calibration]:
    """The calibrations of a file.

    Raises:
        ConfigError: no readable file of that form.
    """
    try:
        return calibrations_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no table of calibrations: {error}") from error


def user_table() -> Path:
    """Where a user's own calibrations are: the file that ``FLIX_CALIBRATION`` names, or one in the user's settings."""
    named = os.environ.get("FLIX_CALIBRATION")
    if named:
        return Path(named)
    settings = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(settings) / "flix" / "calibration.json"


@functools.lru_cache(maxsize=4096)
def picked(strategy: str, facts: Facts) -> str:
    """The strategy of :func:`decide`; remembered, for layers that ask at every forward."""
    return decide(strategy, facts).strategy


@functools.cache
def calibrations() -> dict[str, Calibration]:
    """The calibrations in force: this package's, and in their place the user's own (see :func:`user_table`).

    Read once a process.

    Raises:
        ConfigError: the user's file has another form.
    """
    text = resources.files("flix.core.strategy").joinpath("table.json").read_text(encoding="utf-8")
    own, path = calibrations_from(json.loads(text)), user_table()
    return {**own, **(read_calibrations(path) if path.exists() else {})}


def calibration_of(device: str, table: Mapping[str, Calibration] | None = None) -> Calibration:
    """The calibration that a device goes by: its own, or where nobody measured it that of its framework's CPU.

    Args:
        device: the class of devices.
        table: {device: costs}; default: those in force.

    Raises:
        ConfigError: neither is known.
    """
    known = calibrations() if table is None else table
    found = known.get(device, known.get(f"{device.partition('-')[0]}-cpu"))
    if found is None:
        raise ConfigError(
            f"there is no calibration for {device!r}; there is one for {listed(known)}"
        )
    return found


def decide(strategy: str, facts: Facts, table: Mapping[str, Calibration] | None = None) -> Decision:
    """The strategy to run.

    Args:
        strategy: what the user asked for; anything but ``"auto"`` is taken.
        facts: what is known of the layer and the batch.
        table: {device: costs}; default: those in force.

    Raises:
        ConfigError: no such strategy, or no calibration for the device.
    """
    check_strategy(strategy)
    if strategy != "auto":
        return Decision(strategy, "it was asked for")
    if facts.fused:
        return _with_kernel(facts)
    calibration = calibration_of(facts.device, table)
    # Rows cannot be known to be alike, but for a single one.
    choices = ("single", "gather", "masked") if facts.examples == 1 else ("gather", "masked")
    seconds = {s: calibration.estimate(facts, s) for s in choices}
    if facts.examples == 1:
        return Decision("single", "there is one example, so one composition serves all", seconds)
    best = min(choices, key=seconds.__getitem__)
    other = max(choices, key=seconds.__getitem__)
    times = seconds[other] / seconds[best] if seconds[best] > 0 else float("inf")
    reason = (
        f"{other} is estimated to add {times:.1f} times as much: {facts.examples} examples use "
        f"{facts.rows} rank rows each, {facts.union} together, over {facts.tokens} positions"
    )
    if calibration.device != facts.device:
        reason += f" (by {calibration.device}: {facts.device} is not measured)"
    return Decision(best, reason, seconds)


def _with_kernel(facts: Facts) -> Decision:
    """Where a fused kernel is to be had. Reasoned from bytes, and not measured on a device yet.

    The kernel reads each example's rows where they are, gather copies them first. At one position an example that is
    most of the traffic, and grows with the examples, while the masked product reads the union once.
    """
    shared = facts.union <= _SHARED * facts.rows
    if facts.tokens == 1 and facts.examples >= _MANY_EXAMPLES and shared:
        return Decision(
            "masked",
            f"{facts.examples} examples of one position share {facts.union} rank rows, which the masked product "
            "reads once; the fused kernel would read them for every example",
        )
    return Decision("fused", f"the backend has a fused kernel for {facts.device}")


def fit(
    device: str, samples: Sequence[tuple[Facts, str, float]], measured: str = ""
) -> Calibration:
    """The calibration nearest to measurements, in relative error, with no coefficient below zero.

    Args:
        device: the class of devices.
        samples: (facts, strategy, seconds that it added to the frozen layer's) of each measurement.
        measured: when and on what, in words.

    Raises:
        ConfigError: a strategy has fewer measurements than coefficients.
    """
    seconds: dict[str, tuple[float, ...]] = {}
    for strategy in PLANNED:
        own = [(f.terms(s), t) for f, s, t in samples if s == strategy and t > 0]
        if len(own) < len(TERMS):
            raise ConfigError(
                f"a calibration needs {len(TERMS)} measurements of {strategy!r} or more, got {len(own)}"
            )
        times = np.asarray([t for _, t in own])
        design = np.asarray([terms for terms, _ in own]) / times[:, None]
        seconds[strategy] = tuple(float(c) for c in _nonnegative(design, np.ones(len(own))))
    return Calibration(device, seconds, measured)


def _nonnegative(design: Any, target: Any) -> Any:
    """Least squares with no negative coefficient: the best of all choices of which are zero (there are few)."""
    count = design.shape[1]
    best, error = np.zeros(count), float(target @ target)
    for chosen in range(1, 2**count):
        columns = [i for i in range(count) if chosen >> i & 1]
        scale = np.abs(design[:, columns]).max(0)
        scale[scale == 0] = 1.0
        found = np.linalg.lstsq(design[:, columns] / scale, target, rcond=None)[0] / scale
        if (found < 0).any():
            continue
        missed = float(((design[:, columns] @ found - target) ** 2).sum())
        if missed < error:
            best, error = np.zeros(count), missed
            best[columns] = found
    return best
