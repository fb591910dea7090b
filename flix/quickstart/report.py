"""What the quickstart prints and draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .data import QuickstartData
from .scores import COLUMNS

#: Sample predictions come from these languages first: several scripts, large and small.
SHOWN = ("ka", "ru", "cy", "sw", "tr", "fi", "hu", "de")


def heat_map(data: QuickstartData, difference: Mapping[str, float], title: str, path: Path) -> None:
    """A PNG: language by task, exact match of FLix minus LoRA's; held-out pairs are framed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.patches import Rectangle

    grid = np.full((len(data.languages), len(data.tasks)), np.nan)
    for cell in data.cells:
        if cell.name in difference:
            place = data.languages.index(cell.language), data.tasks.index(cell.task)
            grid[place] = difference[cell.name]
    limit = float(np.nanmax(np.abs(grid), initial=1.0))
    figure, axes = plt.subplots(figsize=(8, 8), layout="constrained")
    image = axes.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(data.tasks)), data.tasks)
    axes.set_yticks(range(len(data.languages)), data.languages)
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            color = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, f"{value:+.0f}", ha="center", va="center", color=color)
    for cell in data.cells:
        if cell.held_out:
            corner = (
                data.tasks.index(cell.task) - 0.5,
                data.languages.index(cell.language) - 0.5,
            )
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2.5))
    axes.set_title(f"{title}\nexact match, points; framed: never trained on (zero-shot)")
    figure.colorbar(image, ax=axes, shrink=0.7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def score_rows(results: Mapping[str, Any], metric: str) -> list[list[str]]:
    """The table of one metric as text: a row a method, a column a kind of cells."""
    rows = []
    for arm in results["arms"].values():
        row = [arm["title"]]
        for column in COLUMNS:
            value = arm["scores"][column][metric]
            spread = f" ±{value['sd']:.1f}" if value["sd"] is not None else ""
            row.append(f"{value['mean']:.1f}{spread}")
        rows.append(row)
    if metric == "exact":
        copied = [f"{results['copy'][column]:.1f}" for column in COLUMNS]
        rows.append(["copying the input", *copied])
    return rows


def rank_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Ranks and parameters by method, as text."""
    return [
        [
            arm["title"],
            ", ".join(f"{group} {rank}" for group, rank in arm["ranks"].items()),
            str(arm["active_rank"]),
            str(arm["total_rank"]),
            f"{arm['trainable']:,}",
            f"{arm['seconds']:.0f} s",
        ]
        for arm in results["arms"].values()
    ]


RANK_HEADINGS = ["method", "ranks", "active", "total", "parameters", "training"]


def samples(data: QuickstartData, folder: Path, count: int = 10) -> list[dict[str, str]]:
    """A few predictions of FLix in several scripts, right and wrong as they come, zero-shot ones among them."""
    answers: dict[str, list[dict[str, str]]] = {}
    with open(folder / "answers.jsonl", encoding="utf-8") as file:
        for line in file:
            answer = json.loads(line)
            answers.setdefault(answer["cell"], []).append(answer)
    chosen: list[dict[str, str]] = []
    for turn, language in enumerate(SHOWN * 2):
        tasks = [task for task in data.tasks if f"{language}/{task}" in answers]
        if not tasks or len(chosen) == count:
            continue
        task = tasks[(3 * turn + 1) % len(tasks)]
        chosen.append(answers[f"{language}/{task}"][turn % len(answers[f"{language}/{task}"])])
    zero = [cell.name for cell in data.zero_shot("test") if cell.name in answers]
    return chosen + [answers[name][0] for name in zero[:2]]


def closing(out: Path) -> str:
    """What to try next."""
    adapter = out / "adapter"
    return (
        f"The adapter is in {adapter}, the heat map in {out / 'heatmap.png'}, all figures in "
        f"{out / 'results.json'}.\n"
        "What to try next:\n"
        f"  flix inspect {adapter}\n"
        "  flix quickstart --seeds 3          the same with three seeds (longer)\n"
        "  flix train examples/train.yaml     your own model and data\n"
        "  README.md                          the library in twenty lines"
    )
