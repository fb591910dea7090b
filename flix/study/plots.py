"""A study's pictures, as SVG files that read well in light and dark, on a page and alone.

Lines and dots have their names beside them, not in a legend. People who cannot tell red from green can tell the
colours apart, and every series also has a mark of its own.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flix.report.figures import COLOURS, Figures

#: Blue, orange, purple, ochre, green, magenta: neighbours differ in lightness or along blue and yellow.
SERIES = (COLOURS[0], COLOURS[1], COLOURS[3], COLOURS[4], COLOURS[2], COLOURS[5])
MARKS = ("o", "s", "D", "^", "v", "P")
_FAINT = "#020202"  # becomes the page's own
_STYLE = """<style>
svg {{ color: #1f2328; --faint: #8b949e; --card: #ffffff; }}
@media (prefers-color-scheme: dark) {{ svg {{ color: #e6edf3; --faint: #8b949e; --card: #0d1117; }} }}
.card {{ fill: var(--card); }}
text {{ font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }}
</style><title>{title}</title><rect class="card" width="100%" height="100%" rx="6"/>"""


@dataclass(frozen=True)
class Dot:
    """A figure with its interval; NaN if there is none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True)
class Line:
    """A line with its name: x, y, and the low and high ends of y where they are known."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ends: Sequence[tuple[float, float]] = ()


class Plots(Figures):
    """Draws a study's pictures; each call returns the text of an SVG file."""

    def _file(self, width: float, height: float, title: str, draw: Any) -> str:
        self._count = 0  # a file of its own: its ids do not depend on the pictures before it
        svg = self._drawn(width, height, draw)
        svg = svg.replace('aria-hidden="true" focusable="false"', f'role="img" aria-label="{html.escape(title)}"', 1)  # fmt: skip
        head, _, rest = svg.partition(">")
        return f"{head}>{_STYLE.format(title=html.escape(title))}{rest}\n"

    def dots(  # type: ignore[override]
        self,
        title: str,
        rows: Sequence[str],
        panels: Mapping[str, Sequence[Mapping[str, Dot]]],
        unit: str,
        *,
        zero: bool = False,
        numbers: bool = False,
        leading: int = 1,
    ) -> str:
        """Dots with intervals: a row for each name, a panel for each heading, a series for each key.

        Args:
            title: for those who hear the picture read.
            rows: names, from above.
            panels: by heading, for each row the dots by series; a single series has no name.
            unit: under the axis.
            zero: draw a line at 0, for differences.
            numbers: write each dot's value.
            leading: rows from above that a single series tells apart by colour.
        """
        series = list(dict.fromkeys(key for some in panels.values() for row in some for key in row))
        alone = len(series) == 1
        height = 0.75 + (0.3 if alone else 0.2 + 0.11 * len(series)) * len(rows) + (0 if alone else 0.3)  # fmt: skip

        across = len(panels) if len(panels) <= 3 else 2 if len(panels) == 4 else 3
        down = math.ceil(len(panels) / across)

        def draw(figure: Any) -> None:
            axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
            for place in axes[len(panels) :]:
                place.set_visible(False)
            for place, (heading, some) in zip(axes, panels.items(), strict=False):
                for number, key in enumerate(series):
                    self._series(
                        place,
                        some,
                        key,
                        number,
                        len(series),
                        numbers,
                        len(rows) if zero else leading,
                        signed=zero,
                    )
                if zero:
                    place.axvline(0, color=_FAINT, lw=1.0)
                place.set_title(heading, fontsize=10, weight="bold", loc="left")
                place.set_xlabel(unit)
                place.grid(visible=False, axis="y")
                place.spines["left"].set_visible(False)
                place.tick_params(axis="y", length=0)
                place.tick_params(axis="x", labelbottom=True)
                if not zero:
                    place.margins(x=0.12)
            if (
                not zero
            ):  # after the last panel: the panels share an axis, and a limit ends its growth
                axes[0].set_xlim(left=0)
            axes[0].set_yticks(range(len(rows)), rows)
            axes[0].set_ylim(len(rows) - 0.45, -0.55)
            if not alone:
                handles, names = axes[0].get_legend_handles_labels()
                figure.legend(handles, names, loc="outside upper left", ncols=min(3, len(series)))

        return self._file(8.2, height * down, title, draw)

    def _series(
        self,
        place: Any,
        rows: Sequence[Mapping[str, Dot]],
        key: str,
        number: int,
        of: int,
        numbers: bool,
        leading: int,
        *,
        signed: bool,
    ) -> None:
        """One series of dots; several stand above each other in their row. Alone, the leading rows are told apart."""
        shift = 0.0 if of == 1 else (number - (of - 1) / 2) * 0.62 / of
        first = True
        for at, row in enumerate(rows):
            if key not in row:
                continue
            dot = row[key]
            look = number if of > 1 else int(at >= leading)
            colour, mark = SERIES[look % len(SERIES)], MARKS[look % len(MARKS)]
            if not np.isnan(dot.low):
                place.plot([dot.low, dot.high], [at + shift] * 2, color=colour, lw=1.8, alpha=0.55, solid_capstyle="round")  # fmt: skip
            label = key if first else None
            place.plot([dot.value], [at + shift], mark, color=colour, ms=6 if of == 1 else 4.5, label=label)  # fmt: skip
            first = False
            if numbers:
                known = not np.isnan(dot.high)
                text = f"{dot.value:+.1f}".replace("-", "\u2212") if signed else f"{dot.value:.1f}"
                place.annotate(text, (dot.high if known else dot.value, at + shift), (4 if known else 7, 0), textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip

    def lines(
        self,
        title: str,
        panels: Mapping[str, Sequence[Line]],
        across: Mapping[str, str],
        up: str,
        *,
        log: bool = False,
        ticks: Sequence[tuple[float, str]] = (),
    ) -> str:
        """Draw lines with their names at their right ends.

        Args:
            title: for those who hear the picture read.
            panels: by heading, the lines.
            across: by heading, what x is.
            up: what y is.
            log: x by doublings.
            ticks: of x, with names.
        """

        def draw(figure: Any) -> None:
            axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
            for place, (heading, lines) in zip(axes, panels.items(), strict=True):
                for number, line in enumerate(lines):
                    colour, mark = SERIES[number % len(SERIES)], MARKS[number % len(MARKS)]
                    if line.ends:
                        low, high = zip(*line.ends, strict=True)
                        place.fill_between(line.x, low, high, color=colour, alpha=0.13, lw=0)
                    place.plot(line.x, line.y, color=colour, lw=2, marker=mark, ms=5)  # fmt: skip
                place.set_title(heading if len(panels) > 1 else "", fontsize=10, weight="bold", loc="left")  # fmt: skip
                place.set_xlabel(across[heading])
                if log:
                    place.set_xscale("log", base=2)
                if ticks:
                    place.set_xticks(*zip(*ticks, strict=True))
                    place.minorticks_off()
            axes[0].set_ylabel(up)
            axes[0].set_ylim(bottom=0)  # after the last panel, as in dots
            top = axes[0].get_ylim()[1]
            for place, lines in zip(axes, panels.values(), strict=True):
                named = [(line, number) for number, line in enumerate(lines) if len(line.y)]
                tall = 0.075 * max(
                    (1 + broken(line.name).count("\n") for line, _ in named), default=1
                )
                heights = apart([line.y[-1] for line, _ in named], tall * top)
                highest = max([*heights, 0.0]) + tall * top
                axes[0].set_ylim(top=max(axes[0].get_ylim()[1], highest))
                for (line, number), y in zip(named, heights, strict=True):
                    place.annotate(broken(line.name), (line.x[-1], y), (8, 0), textcoords="offset points", va="center", fontsize=8.5,
                                   color=SERIES[number % len(SERIES)], annotation_clip=False)  # fmt: skip

        return self._file(4.6 + 3.6 * (len(panels) - 1) + 1.0, 3.3, title, draw)

    def scatter(
        self, title: str, points: Mapping[str, tuple[float, Dot]], across: str, up: str
    ) -> str:
        """Points with their names beside them, x by powers of ten; those at x = 0 are lines across."""

        def draw(figure: Any) -> None:
            axes = figure.subplots()
            axes.set_xscale("log")
            values = [dot.value for _, dot in points.values()]
            heights = apart(values, 0.07 * (max(values) or 1.0))
            for number, ((name, (x, dot)), y) in enumerate(zip(points.items(), heights, strict=True)):  # fmt: skip
                colour, mark = SERIES[number % len(SERIES)], MARKS[number % len(MARKS)]
                if x <= 0:
                    axes.axhline(dot.value, color=colour, lw=1.2, ls="--")
                    axes.annotate(name, (0.01, dot.value), (0, 4), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8.5)  # fmt: skip
                    continue
                if not np.isnan(dot.low):
                    axes.plot([x, x], [dot.low, dot.high], color=colour, lw=1.8, alpha=0.55)
                axes.plot([x], [dot.value], mark, color=colour, ms=7)
                axes.annotate(name, (x, y), (9, 0), textcoords="offset points", va="center", fontsize=8.5, annotation_clip=False)  # fmt: skip
            axes.set_xlabel(across)
            axes.set_ylabel(up)
            axes.set_ylim(bottom=0)
            known = [x for x, _ in points.values() if x > 0] or [1.0]
            axes.set_xlim(min(known) / 1.6, max(known) * 2.2)
            axes.xaxis.set_major_formatter(lambda value, _: large(value))
            axes.xaxis.set_minor_formatter(lambda value, _: large(value) if f"{value:e}"[0] in "25" else "")  # fmt: skip

        return self._file(6.6, 3.6, title, draw)


def large(value: float) -> str:
    """200 k, 1 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def broken(name: str, width: int = 26) -> str:
    """A long name in several lines."""
    return "\n".join(textwrap.wrap(name, width, break_long_words=False))


def apart(heights: Sequence[float], least: float) -> list[float]:
    """Heights moved as little as it takes for neighbours to be so far from each other; their order stays."""
    order = sorted(range(len(heights)), key=lambda i: (heights[i], i))
    groups: list[tuple[list[int], float]] = []  # places, and the height of the middle
    for i in order:
        groups.append(([i], heights[i]))
        while len(groups) > 1 and _overlap(groups[-2], groups[-1], least):
            (a, x), (b, y) = groups[-2], groups[-1]
            groups[-2:] = [([*a, *b], (x * len(a) + y * len(b)) / (len(a) + len(b)))]
    found = list(heights)
    for places, middle in groups:
        for rank, i in enumerate(places):
            found[i] = middle + (rank - (len(places) - 1) / 2) * least
    return found


def _overlap(lower: tuple[list[int], float], upper: tuple[list[int], float], least: float) -> bool:
    return (upper[1] - lower[1]) < least * (len(lower[0]) + len(upper[0])) / 2 - 1e-12
