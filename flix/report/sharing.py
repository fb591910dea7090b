"""What features share, on the page: cosines, norms, ranks, and what leaving one out costs."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flix.core.costs import feature_cost
from flix.core.features.names import written
from flix.report.figures import Figures
from flix.report.records import LeftOut
from flix.report.runs import Run
from flix.report.updates import Updates
from flix.report.view import Figure, Table, View


def shared(view: View, updates: Updates, figures: Figures) -> dict[str, Any]:
    tables, data = [], []
    for matrix in updates.matrices:
        own = matrix.groups[0] == matrix.groups[1]
        apart = matrix.overall[~np.eye(len(matrix.rows), dtype=bool)] if own else matrix.overall
        known = np.abs(apart[~np.isnan(apart)])
        most = max(float(known.max()) if known.size else 0.0, 0.02)
        between = matrix.groups[0] if own else " and ".join(matrix.groups)
        tables.append(
            {
                "label": f"Cosines of {between}",
                "caption": f"{between}: cosines in hundredths; full colour at ±{100 * most:.0f}."
                + (f" The {matrix.left_out} smallest are left out." if matrix.left_out else ""),
                "rows": matrix.rows,
                "columns": matrix.columns,
                "squares": [
                    [_cosine(value, 0.0 if own and i == j else most) for j, value in enumerate(row)]
                    for i, row in enumerate(matrix.overall)
                ],
            }
        )
        values = [matrix.overall, *matrix.by_layer]
        data.append(
            {"most": round(100 * most, 2), "own": own, "values": [_bytes(v) for v in values]}
        )
    return {
        "text": _shared_text(updates),
        "layers": updates.layers,
        "tables": tables,
        "data": data,
        "figures": _shared_figures(view, updates, figures),
    }


def _shared_text(updates: Updates) -> str:
    text = (
        "The cosine between two features' updates s B A: 100 is the same direction, 0 nothing in "
        "common, below 0 against each other. Features are in the order of a clustering, so that "
        "similar ones are neighbours."
    )
    if updates.untrained:
        names = ", ".join(written(f) for f in updates.untrained[:10])
        text += f" Without an update (B is zero, or the rank is): {names}"
        text += f" and {len(updates.untrained) - 10} more." if len(updates.untrained) > 10 else "."
    return text


def _shared_figures(view: View, updates: Updates, figures: Figures) -> list[Figure]:
    lines = {}
    for matrix in updates.matrices:
        if matrix.groups[0] == matrix.groups[1]:
            upper = np.triu_indices(len(matrix.rows), 1)
            pairs = matrix.by_layer[:, upper[0], upper[1]]
            known = ~np.isnan(pairs)
            total = np.where(known, pairs, 0.0).sum(axis=1)
            lines[matrix.groups[0]] = np.where(
                known.any(1), total / np.maximum(known.sum(1), 1), np.nan
            )
    found = []
    if lines and len(updates.layers) > 1:
        found.append(
            Figure(
                figures.by_layer(lines, "mean cosine"),
                view.heading("Mean cosine by layer"),
                "How similar the features of a group are in each layer: the mean cosine over all "
                "pairs, in the order of "
                "the model's layers.",
            )
        )  # fmt: skip
    if updates.layers and updates.features:
        names = [written(f) for f in updates.features]
        found.append(
            Figure(
                figures.heat(updates.norms, _shortened(updates.layers), names, "norm of s B A"),
                view.heading("Norms by layer and feature"),
                "The norm of each feature's update in each layer: where the features put their change.",
            )
        )
    return found


def _shortened(layers: Sequence[str]) -> list[str]:
    """Layers' paths without what all of them begin with."""
    parts = [layer.split(".") for layer in layers]
    depth = 0
    while all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    return [".".join(p[depth:]) for p in parts]


def _cosine(value: float, most: float) -> tuple[str, int]:
    """A cosine's text and colour; none where ``most`` is 0, as for a feature with itself."""
    if np.isnan(value):
        return "–", 0
    whole = round(100 * value)  # all that the script knows, which must give the same colour
    heat = math.floor(100 * whole / round(100 * most, 2) + 0.5) if most else 0
    return f"{whole}".replace("-", "−"), max(-100, min(100, heat))


def _bytes(values: NDArray[np.float64]) -> str:
    """Cosines in hundredths, a signed byte each; -128 for NaN."""
    whole = np.where(np.isnan(values), -128, np.round(100 * np.nan_to_num(values)))
    return base64.b64encode(whole.astype(np.int8).tobytes()).decode()


def features(run: Run, updates: Updates | None) -> Table | None:
    """Ranks, parameters, norms, and what leaving a feature out costs."""
    left: dict[str, LeftOut] = {e.feature: e for e in (run.metrics.left_out if run.metrics else ())}
    counts: dict[str, str] = {}
    ranks: dict[str, str] = {}
    norms: dict[str, str] = {}
    if run.adapter is not None and updates is not None:
        config, layers = run.adapter.config, run.adapter.layers
        for feature in config.registry.live:
            name = written(feature)
            ranks[name] = _ranks({config.rank(layer, feature) for layer in layers})
            counts[name] = f"{feature_cost(config, layers, feature).parameters:,}"
            norms[name] = f"{updates.totals[feature]:.3g}"
    else:
        told = (
            run.facts.get("parameters").get("by_feature")
            if run.facts.get("parameters").value
            else None
        )
        for name, part in told.items() if told is not None else ():
            counts[name] = f"{part.whole() or 0:,}"
    names = list(dict.fromkeys([*counts, *left]))
    if not names:
        return None
    return Table(
        "Rank, parameters and norm of each feature; and the loss over the rows that it is active in, with it and when it "
        "is left out." + ("" if left else " What leaving one out costs was not measured."),
        ["feature", "rank", "parameters", "norm", "rows", "loss", "without it", "costs"],
        [
            [name, ranks.get(name, ""), counts.get(name, ""), norms.get(name, ""), *_left(left.get(name))]
            for name in names
        ],
    )  # fmt: skip


def _left(entry: LeftOut | None) -> list[str]:
    if entry is None:
        return ["", "", "", ""]
    numbers = (
        "–" if v is None else f"{v:.3f}".replace("-", "−") for v in (entry.loss, entry.without)
    )
    cost = "–" if entry.cost is None else f"{entry.cost:+.3f}".replace("-", "−")
    return [f"{entry.rows:,}", *numbers, cost]


def _ranks(found: set[int]) -> str:
    if not found:
        return ""
    return str(min(found)) if len(found) == 1 else f"{min(found)} to {max(found)}"
