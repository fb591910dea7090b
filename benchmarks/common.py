"""What every comparison shares: candidates run in turn, figures that survive a busy machine, and what ran where.

A candidate is an :class:`Arm`. Every round runs each arm once, and an arm's figure is the median over rounds of its
time over the first arm's in the same round, so that drift of the machine cancels. The order is turned round every
other round, so that no arm always follows the same one.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Results = Mapping[str, Any]


def _nothing() -> None:
    return None


def as_given(out: Any) -> Results:
    """The results of an arm whose run returns them by name."""
    return out


@dataclass
class Arm:
    """One candidate of a comparison.

    Attributes:
        name: how tables call it.
        run: the work that is timed. It returns what was computed, and that is held until the clock has stopped: a
            compiler must compute all of it, and no time is won by freeing it.
        results: the output and gradients by name, read from what ``run`` returned; None marks a gradient that was not
            computed. Not timed.
        reset: done before every run, not timed: what an optimizer's ``zero_grad`` does.
        model: what holds the parameters, if anything does.
        around: what is in force while the arm runs; entering and leaving it is not timed.
    """

    name: str
    run: Callable[[], Any]
    results: Callable[[Any], Results] = as_given
    reset: Callable[[], None] = _nothing
    model: Any = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Figure:
    """A median with its quartiles.

    Attributes:
        median: the figure.
        low: the first quartile.
        high: the third.
    """

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        return (self.high - self.low) / 2


def figure(values: Sequence[float]) -> Figure:
    """Median and quartiles of some values."""
    if not values:
        raise ValueError("a figure needs at least one value")
    low, median, high = np.percentile(np.asarray(values, dtype=float), (25, 50, 75))
    return Figure(float(median), float(low), float(high))


def over(times: Mapping[str, Sequence[float]], base: str) -> dict[str, Figure]:
    """Each arm's time over the base's in the same round.

    Args:
        times: seconds by arm, one for each round.
        base: the arm that the others are divided by.
    """
    return {
        name: figure([t / b for t, b in zip(values, times[base], strict=True)])
        for name, values in times.items()
    }


def once(arm: Arm) -> tuple[float, Any]:
    """Seconds of one run, and what it returned."""
    arm.reset()
    with arm.around():
        start = time.perf_counter()
        out = arm.run()
        return time.perf_counter() - start, out


def interleaved(
    arms: Sequence[Arm], rounds: int, warmup: int, limit: float | None = None
) -> Iterator[tuple[int, Arm]]:
    """Every arm once in every round, with the round's number; below 0 it does not count. See :func:`interleave`."""
    begun = time.perf_counter()
    for number in range(-warmup, rounds):
        if number >= 3 and limit is not None and time.perf_counter() - begun > limit:
            break
        gc.collect()
        for arm in arms if number % 2 else reversed(arms):
            yield number, arm


def interleave(
    arms: Sequence[Arm],
    rounds: int,
    warmup: int = 2,
    limit: float | None = None,
    seen: Callable[[str, Any], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every arm in every round.

    Args:
        arms: the candidates.
        rounds: how many rounds are run.
        warmup: how many rounds are thrown away first.
        limit: seconds after which no further round begins (at least three are run).
        seen: gets each arm's name and what its run returned, in the rounds that count; not timed.
    """
    if len({arm.name for arm in arms}) != len(arms):
        raise ValueError("two arms of one name")
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    gc.collect()
    gc.freeze()  # what is there stays: the collector does not walk over whole models between the rounds
    for number, arm in interleaved(arms, rounds, warmup, limit):
        seconds, out = once(arm)
        if number >= 0:
            times[arm.name].append(seconds)
            if seen is not None:
                seen(arm.name, out)
        del out  # not kept while the next arm runs
    gc.unfreeze()
    return times


@dataclass
class Table:
    """One table of a report.

    Attributes:
        title: its heading.
        columns: heads of all columns, that of the labels among them.
        rows: a label and then the cells, each a number, a string, a :class:`Figure` or None.
        note: what a reader must know of it.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""


@dataclass
class Bar:
    """A limit that a figure is held to.

    Attributes:
        what: the figure.
        value: what was measured.
        limit: the limit.
        at_most: whether the value may not be above the limit, or not below it.
    """

    what: str
    value: Figure | float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the figure keeps to its limit, rounded as it is shown (two decimals)."""
        value = self.value.median if isinstance(self.value, Figure) else self.value
        return round(value, 2) <= self.limit if self.at_most else round(value, 2) >= self.limit


@dataclass
class Plot:
    """One plot of a report.

    Attributes:
        file: its name in docs/images.
        title, x_label, y_label: what it says.
        x: positions, or names for a plot of bars.
        series: heights by name; None leaves a point out.
        log_x: whether x is logarithmic.
    """

    file: str
    title: str
    x_label: str
    y_label: str
    x: list[Any]
    series: dict[str, list[float | None]]
    log_x: bool = False


@dataclass
class Result:
    """What one part of the suite found.

    Attributes:
        part: its name.
        title: the heading of its section.
        tables, bars, plots: see there.
        method: how it was measured, for the reader.
        environment: of :func:`environment`.
    """

    part: str
    title: str
    tables: list[Table] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    method: str = ""
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values; bars say whether they were met."""
        made = asdict(self)
        for given, bar in zip(made["bars"], self.bars, strict=True):
            given["met"] = bar.met
        return made


def ratio_table(
    title: str, columns: Mapping[str, Mapping[str, Any]], label: str = "", note: str = ""
) -> Table:
    """A table of figures by column and row; rows stand in the order in which they first appear."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[name, *(column.get(name) for column in columns.values())] for name in names]
    return Table(title, [label, *columns], rows, note)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(packages: Sequence[str], threads: int = 1) -> dict[str, Any]:
    """Date, machine, how busy it was, and versions, so that a figure can be placed later.

    Args:
        packages: distributions whose versions matter.
        threads: the threads that the measured code may use.
    """
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def median_ms(seconds: Sequence[float]) -> float:
    """Median of some seconds, in milliseconds."""
    return statistics.median(seconds) * 1e3
