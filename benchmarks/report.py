"""Results as Markdown in docs/speed.md and as plots in docs/images.

The page keeps its own words; what is measured stands between markers, ``<!-- bench:NAME -->`` and
``<!-- /bench:NAME -->``, and is written anew from the JSON files of the last run. Parts that were not run keep what
they had.

    python -m benchmarks.report [--out benchmarks/out] [--docs docs]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PARTS = (
    "layer-torch",
    "layer-jax",
    "layer-tensorflow",
    "model-t5",
    "model-gpt2",
    "model-int8",
    "tenants-t5",
    "tenants-gpt2",
    "model-jax",
    "model-keras",
    "scale-layer",
    "scale-features",
    "scale-paging",
)
"""What ``benchmarks.run`` measures, in the order of the page."""
SECTIONS = (*PARTS, "gpu")
"""What the page shows: ``benchmarks.gpu`` measures its part where there is a card."""
ROOT = Path(__file__).resolve().parents[1]


def number(value: float) -> str:
    """A number as tables show it: three significant digits, no fewer than its integer part."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"not a number: {value!r}")
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def cell(value: Any) -> str:
    """One cell: a figure with half its interquartile range, a number, a string, or a dash."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        spread = (value["high"] - value["low"]) / 2
        if value["low"] == value["high"]:
            return number(value["median"])
        return f"{number(value['median'])} ± {number(spread)}"
    return value.replace("|", "\\|") if isinstance(value, str) else number(value)


def write_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    width = len(columns)
    if any(len(row) != width for row in rows):
        raise ValueError("a row has more or fewer cells than there are columns")
    lines = [
        [cell(head) for head in columns],
        ["---"] * width,
        *([cell(value) for value in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read_table(text: str) -> tuple[list[str], list[list[str]]]:
    """The cells of a table that :func:`write_table` wrote: (columns, rows)."""
    lines = [
        [part.strip().replace("\0", "|") for part in line.replace("\\|", "\0").split("|")[1:-1]]
        for line in text.strip().splitlines()
    ]
    return lines[0], lines[2:]


def replace_block(page: str, name: str, text: str) -> str:
    """The page with this text between the markers of a name; markers that are not there yet are put at its end."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    block = f"{begin}\n{text.strip()}\n{end}"
    if (begin in page) != (end in page):
        raise ValueError(f"the page has one of the markers of {name!r} without the other")
    if begin not in page:
        return f"{page.rstrip()}\n\n{block}\n"
    before, _, rest = page.partition(begin)
    return before + block + rest.partition(end)[2]


def read_block(page: str, name: str) -> str | None:
    """What stands between the markers of a name."""
    _, found, rest = page.partition(f"<!-- bench:{name} -->\n")
    return rest.partition(f"\n<!-- /bench:{name} -->")[0] if found else None


def environment_line(environment: Mapping[str, Any]) -> str:
    """Where and when, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    load = environment.get("load")
    busy = "" if load is None else f"load average {load} at the start, "
    card = environment.get("gpu", "no GPU")
    return (
        f"{environment['date']}, {environment['cpu']}, {environment['cores']} cores, {card}, {busy}"
        f"{environment['threads']} thread, Python {environment['python']}, {versions}."
    )


def section(result: Mapping[str, Any]) -> str:
    """One part's section."""
    parts = [f"## {result['title']}", result["method"]]
    for table in result["tables"]:
        parts += [f"**{table['title']}**", write_table(table["columns"], table["rows"])]
        if table["note"]:
            parts.append(table["note"])
    parts += [f"![{plot['title']}](images/{plot['file']})" for plot in result["plots"]]
    parts.append(f"*{environment_line(result['environment'])}*")
    return "\n\n".join(part for part in parts if part)


def bars_table(results: Sequence[Mapping[str, Any]]) -> str:
    """What was aimed at and what was reached, of all parts."""
    rows = [
        [
            bar["what"],
            bar["value"],
            f"{'at most' if bar['at_most'] else 'at least'} {number(bar['limit'])}",
            "yes" if bar["met"] else "**no**",
        ]
        for result in results
        for bar in result["bars"]
    ]
    return write_table(["", "measured", "aim", "reached"], rows)


def read_results(out: Path) -> list[dict[str, Any]]:
    """The results of the last runs, in the order of the page; without dry runs, whose figures mean nothing."""
    files = [out / f"{name}.json" for name in SECTIONS]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    return [result for result in found if not result.get("dry_run")]


def draw(plot: Mapping[str, Any], file: Path) -> None:
    """One plot as PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=120)
    named = isinstance(plot["x"][0], str)
    count = len(plot["series"])
    for i, (name, given) in enumerate(plot["series"].items()):
        heights = [float("nan") if height is None else height for height in given]
        if named:
            places = [k + 0.8 * (i - (count - 1) / 2) / count for k in range(len(plot["x"]))]
            axes.barh(places, heights, height=0.8 / count, label=name)
        else:
            axes.plot(plot["x"], heights, marker="o", label=name)
    if named:
        axes.set_yticks(range(len(plot["x"])), plot["x"])
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel(plot["y_label"])
    else:
        if plot["log_x"]:
            axes.set_xscale("log")
            axes.set_xticks(plot["x"], [f"{x:,}" for x in plot["x"]])
            axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(plot["x_label"])
        axes.set_ylabel(plot["y_label"])
        axes.grid(alpha=0.3)
    axes.set_title(plot["title"])
    if count > 1:
        axes.legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    # No date inside, so that the same figures give the same file.
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)


def write_docs(out: Path, docs: Path) -> list[str]:
    """Write the page and the plots from the results in a folder.

    Args:
        out: the folder of the JSON files.
        docs: the folder of speed.md; plots go to its images.

    Returns:
        The parts that were found.
    """
    results = read_results(out)
    page_file = docs / "speed.md"
    page = page_file.read_text(encoding="utf-8")
    page = replace_block(page, "bars", bars_table(results))
    for result in results:
        page = replace_block(page, result["part"], section(result))
        for plot in result["plots"]:
            draw(plot, docs / "images" / plot["file"])
    page_file.write_text(page, encoding="utf-8")
    return [result["part"] for result in results]


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    print("wrote", ", ".join(write_docs(options.out, options.docs)))


if __name__ == "__main__":
    main()
