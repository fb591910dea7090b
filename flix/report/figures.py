"""Figures as SVG that stands in a page: texts stay texts, colours follow the page's."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.errors import MissingFrameworkError
from flix.report.records import Point

COLOURS = ("#2f7ec0", "#d9731c", "#3a9a5b", "#a45cc0", "#b8860b", "#c8488a")
_INK, _FAINT = "#010101", "#020202"  # become the page's own colours
_POINTS = 150  # of a curve
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a name is a "$"
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "path.simplify": True,
}


class Figures:
    """Draws figures; each gets ids of its own, so that many can stand in one page.

    Raises:
        MissingFrameworkError: matplotlib is not installed.
    """

    def __init__(self) -> None:
        try:
            import matplotlib
            import matplotlib.figure
        except ImportError as error:
            raise MissingFrameworkError(
                'figures need matplotlib; install it with: pip install "flix-peft[report]"'
            ) from error
        self._matplotlib: Any = matplotlib
        self._count = 0

    def _drawn(self, width: float, height: float, draw: Callable[[Any], None], **more: Any) -> str:
        """What ``draw`` puts on a figure of so many inches, as SVG."""
        self._count += 1
        style = {**_STYLE, "svg.hashsalt": f"flix{self._count}"}
        with self._matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # letters that the measuring font lacks; the browser has others
            figure = self._matplotlib.figure.Figure((width, height), layout="constrained", **more)
            draw(figure)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True, dpi=72)
        return _embedded(file.getvalue(), f"f{self._count}-")

    def curves(
        self, what: str, by_run: Mapping[str, Sequence[tuple[str, str, Sequence[Point]]]]
    ) -> str:
        """Curves over steps; of each run some, as (label, style of the line, points)."""

        def draw(figure: Any) -> None:
            axes = figure.subplots()
            for colour, lines in zip(_cycle(len(by_run)), by_run.values(), strict=True):
                for label, style, points in lines:
                    kept = thinned(points)
                    mark = "o" if len(kept) == 1 else None
                    x, y = zip(*kept, strict=True) if kept else ((), ())
                    alpha = 0.55 if style == ":" else 1.0
                    axes.plot(
                        x, y, style, color=colour, label=label, lw=1.6, alpha=alpha, marker=mark
                    )
            axes.set_xlabel("step")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylabel(what)
            if sum(map(len, by_run.values())) > 1:
                axes.legend()

        return self._drawn(6.4, 3.0, draw)

    def panels(self, by_name: Mapping[str, Sequence[Point]]) -> str:
        """A small panel for each name, all on one scale: its curve, and the mean of all curves, faint."""
        across = min(6, len(by_name))
        down = math.ceil(len(by_name) / across)
        curves = {name: np.array(thinned(points, 60)) for name, points in by_name.items()}
        values = np.concatenate([curve[:, 1] for curve in curves.values()])
        low, tall = float(values.min()), float(np.quantile(values, 0.995) - values.min()) or 1.0
        last = max(float(curve[-1, 0]) for curve in curves.values())
        steps = np.linspace(0, last, 60)
        inside = [np.interp(steps, c[:, 0], c[:, 1], np.nan, np.nan) for c in curves.values()]
        mean = np.stack([steps, _mean_of(np.stack(inside))], 1)

        def draw(figure: Any) -> None:
            # One pair of axes holds all panels, each curve moved to its place: quick to draw, and small.
            axes = figure.subplots()
            axes.set_axis_off()
            for number, (name, curve) in enumerate(curves.items()):
                x, y = (number % across) * 1.12, -(number // across) * 1.5
                axes.plot([x, x + 1], [y, y], color=_FAINT, lw=0.6)
                for some, colour, width in ((mean, _FAINT, 1.0), (curve, COLOURS[0], 1.5)):
                    up = np.clip((some[:, 1] - low) / tall, 0, 1.05)
                    mark = "." if len(some) == 1 else None
                    axes.plot(
                        x + some[:, 0] / (last or 1.0), y + up, color=colour, lw=width, marker=mark
                    )
                axes.text(x, y + 1.08, name, fontsize=8.5, weight="bold")
                axes.text(x + 1, y + 1.08, f"{curve[-1, 1]:.2f}", fontsize=8, ha="right")
            axes.set_xlim(-0.02, across * 1.12 - 0.1)
            axes.set_ylim(-(down - 1) * 1.5 - 0.05, 1.4)

        return self._drawn(1.3 * across, 0.35 + 0.85 * down, draw)

    def heat(
        self, values: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], what: str
    ) -> str:
        """A picture of numbers with a bar that says what its colours mean."""
        height = min(max(1.8, 0.14 * len(rows) + 1.3), 11.0)
        every = max(1, math.ceil(len(rows) / ((height - 1.2) / 0.13)))

        def draw(figure: Any) -> None:
            axes = figure.subplots()
            axes.grid(False)
            image = axes.imshow(values, aspect="auto", interpolation="none", cmap="viridis", vmin=0)
            turned = 90 if len(columns) > 8 or max(map(len, columns)) > 8 else 0
            axes.set_xticks(range(len(columns)), columns, rotation=turned, fontsize=7.5)
            axes.set_yticks(range(0, len(rows), every), rows[::every], fontsize=7)
            figure.colorbar(image, ax=axes, label=what, pad=0.01)

        return self._drawn(max(5.0, min(9.0, 2.8 + 0.17 * len(columns))), height, draw)

    def by_layer(self, lines: Mapping[str, NDArray[np.float64]], what: str) -> str:
        """A line for each name, over the layers in their order."""

        def draw(figure: Any) -> None:
            axes = figure.subplots()
            for colour, (name, values) in zip(_cycle(len(lines)), lines.items(), strict=True):
                axes.plot(range(1, len(values) + 1), values, color=colour, label=name, lw=1.5,
                          marker="o" if len(values) < 40 else None, ms=3)  # fmt: skip
            axes.axhline(0, color=_FAINT, lw=0.8)
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylabel(what)
            axes.legend()

        return self._drawn(6.4, 2.6, draw)

    def dots(self, groups: Mapping[str, Sequence[tuple[str, float, float]]]) -> str:
        """Two shares of each name, as two dots on a line: of the rows, and of the draws."""
        sizes = [len(some) for some in groups.values()]

        def draw(figure: Any) -> None:
            axes = figure.subplots(1, len(groups), squeeze=False)[0]
            for place, (group, some) in zip(axes, groups.items(), strict=True):
                at = np.arange(len(some))[::-1]
                rows, draws = (np.array([100 * entry[i] for entry in some]) for i in (1, 2))
                place.hlines(at, rows, draws, color=_FAINT, lw=1.2, alpha=0.7)
                place.plot(rows, at, "o", color=COLOURS[1], ms=4, label="share of the rows")
                place.plot(draws, at, "o", color=COLOURS[0], ms=4, label="share of the draws")
                place.set_yticks(at, [entry[0] for entry in some], fontsize=8)
                place.set_xlabel("%")
                place.set_title(group, fontsize=9)
                place.set_xlim(left=0)
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)

        return self._drawn(min(8.0, 4.0 * len(groups)), 1.3 + 0.17 * max(sizes), draw)


def _mean_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each column over what is known in it."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def thinned(points: Sequence[Point], most: int = _POINTS) -> list[Point]:
    """At most so many points: means of neighbours where there are more."""
    if len(points) <= most:
        return list(points)
    parts = np.array_split(np.array(points, np.float64), most)
    return [(float(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


def _embedded(svg: str, prefix: str) -> str:
    """An SVG file as an element of a page: no prologue, ids of its own, the page's colours and fonts."""
    svg = re.sub(
        r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg[svg.index("<svg") :], flags=re.S
    )

    def mended(tag: re.Match[str]) -> str:
        """A tag (in which matplotlib escapes ">"); texts, which hold names of the data, stay as they are."""
        text = re.sub(r'(\s)id="', rf'\1id="{prefix}', tag[0])
        text = re.sub(r'(xlink:href="|url\()#', rf"\1#{prefix}", text)
        text = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", text)
        return text.replace(_INK, "currentColor").replace(_FAINT, "var(--faint)")

    svg = re.sub(r"<[^>]+>", mended, svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
