"""Draw the site's pictures: ``python docs/drawings.py`` writes docs/images/drawings/*.svg.

On the site they stand inside the page and follow its theme; elsewhere they follow the reader's light or dark mode.
The figures of ``speed.svg`` are read from docs/speed.md, and those of ``quickstart.svg`` from docs/quickstart.md. A
test checks that what is committed is what this draws.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / "images" / "drawings"

# Of each picture: light and dark are told apart by the system's setting, or by the theme's variable where there is one.
STYLE = """
.fx { --ink: #1a1c20; --soft: #5b616b; --line: #9aa0a8; --fill: #eef0f3;
      --a: #0b5fa5; --b: #b0640f; --c: #2e7d4f; --d: #7a4aa8; }
@media (prefers-color-scheme: dark) { .fx { --ink: #e8eaed; --soft: #a5abb5; --line: #6d737c; --fill: #24272c;
      --a: #6db3f2; --b: #f0a75a; --c: #74c796; --d: #c39bea; } }
body[data-theme="light"] .fx { --ink: #1a1c20; --soft: #5b616b; --line: #9aa0a8; --fill: #eef0f3;
      --a: #0b5fa5; --b: #b0640f; --c: #2e7d4f; --d: #7a4aa8; }
body[data-theme="dark"] .fx { --ink: #e8eaed; --soft: #a5abb5; --line: #6d737c; --fill: #24272c;
      --a: #6db3f2; --b: #f0a75a; --c: #74c796; --d: #c39bea; }
.fx text { font-family: system-ui, sans-serif; font-size: 14px; fill: var(--ink); }
.fx .soft { fill: var(--soft); font-size: 12.5px; }
.fx .bold { font-weight: 600; }
.fx .on { fill: var(--fill); font-weight: 600; }
.fx .box { fill: var(--fill); stroke: var(--line); }
.fx .edge { stroke: var(--line); stroke-width: 1.5; fill: none; }
.fx .gone { stroke: var(--line); stroke-dasharray: 4 4; fill: none; }
"""
LANGUAGES = {"swa": "a", "yor": "b"}
TASKS = {"NER": "c", "topic": "d"}
COLOURS = {**LANGUAGES, **TASKS}


class Drawing:
    """An SVG that is written from left to right and top to bottom; sizes in pixels."""

    def __init__(self, name: str, width: int, height: int, title: str) -> None:
        self.name = name
        self.size = (width, height)
        self.title = title
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str = "") -> None:
        """A rectangle: of a colour of the palette, or plain."""
        how = f'style="fill: var(--{colour})"' if colour else 'class="box"'
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" {how}/>'
        )

    def chip(self, x: float, y: float, name: str, width: float = 62, gone: bool = False) -> None:
        """A feature's name on its colour, or crossed out."""
        if gone:
            self.parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="24" rx="4" class="gone"/>'
            )
        else:
            self.box(x, y, width, 24, COLOURS[name])
        self.text(x + width / 2, y + 17, name, "soft" if gone else "on", "middle")

    def pair(self, x: float, y: float, name: str, rank: int) -> None:
        """A feature's A and B: their thickness is the rank."""
        colour, thick = COLOURS[name], 4 + rank * 1.6
        self.box(x, y, thick, 54, colour)
        self.box(x + thick + 6, y + 27 - thick / 2, 54, thick, colour)

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(
            f'<path class="edge" marker-end="url(#fx-arrow-{self.name})" d="M{x1:g} {y1:g} C{(x1 + x2) / 2:g} {y1:g} '
            f'{(x1 + x2) / 2:g} {y2:g} {x2:g} {y2:g}"/>'
        )

    def svg(self) -> str:
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="fx" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">\n<title>{escape(self.title)}</title>\n'
            f"<style>{STYLE}</style>\n"
            f'<defs><marker id="fx-arrow-{self.name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" style="fill: var(--line)"/></marker></defs>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def features() -> Drawing:
    """A table of data becomes a registry; each feature has a pair of its own rank."""
    it = Drawing(
        "features", 680, 262, "Rows name features; each feature owns a pair A and B of its own rank"
    )
    it.text(16, 24, "Your data says what each row is ...", "bold")
    for n, (language, task, words) in enumerate(
        [
            ("swa", "NER", "Asha anaishi Mombasa"),
            ("yor", "topic", "Ọjà owó lónìí"),
            ("swa", "topic", "Mechi ya jana usiku"),
        ]
    ):
        y = 44 + n * 38
        it.chip(16, y, language)
        it.chip(84, y, task)
        it.text(158, y + 17, words)
    it.text(16, 184, "Three rows, four features, two groups:", "soft")
    it.text(16, 202, "language (swa, yor) and task (NER, topic).", "soft")
    it.text(366, 24, "... and each feature owns an update.", "bold")
    for n, (name, rank) in enumerate([("swa", 4), ("yor", 4), ("NER", 12), ("topic", 12)]):
        x, y = 366 + n % 2 * 156, 44 + n // 2 * 104
        it.pair(x, y, name, rank)
        it.text(x, y + 76, f"{name}: B A, rank {rank}", "soft")
    it.text(366, 250, "The rank is the feature's own choice.", "soft")
    return it


def routing() -> Drawing:
    """Rows of a batch to ids and weights."""
    it = Drawing("routing", 680, 236, "Encoding: names of rows become ids and weights; -1 pads")
    it.text(16, 24, "rows", "bold")
    it.text(330, 24, "ids", "bold")
    it.text(520, 24, "weights", "bold")
    rows = [
        ("{language: swa, task: NER}", ["0", "2"], ["1", "1"]),
        ("{language: yor, task: topic}", ["1", "3"], ["1", "1"]),
        ("{language: {swa: 0.7, yor: 0.3}}", ["0", "1"], ["0.7", "0.3"]),
        ("{language: swa, task: None}", ["0", "-1"], ["1", "0"]),
    ]
    names = [*COLOURS]
    for n, (row, ids, weights) in enumerate(rows):
        y = 40 + n * 40
        it.text(16, y + 18, row)
        it.arrow(254, y + 13, 318, y + 13)
        for k, (number, weight) in enumerate(zip(ids, weights, strict=True)):
            colour = COLOURS[names[int(number)]] if number != "-1" else ""
            it.box(330 + k * 64, y, 56, 27, colour)
            it.text(358 + k * 64, y + 18, number, "on" if colour else "soft", "middle")
            it.box(520 + k * 64, y, 56, 27)
            it.text(548 + k * 64, y + 18, weight, "", "middle")
    it.text(
        16,
        222,
        "registry.encode(rows): two arrays of the batch's size. An id of -1 says that there is nothing.",
        "soft",
    )
    return it


def composition() -> Drawing:
    """One layer, two rows, each with its own sum."""
    it = Drawing(
        "composition",
        680,
        300,
        "In a layer, each row gets the frozen product plus the sum of its own features' updates",
    )
    it.text(16, 24, "One layer, one batch: every row has its own sum.", "bold")
    for n, (language, task) in enumerate([("swa", "NER"), ("yor", "topic")]):
        y = 52 + n * 122
        it.chip(16, y + 8, language)
        it.chip(16, y + 38, task)
        it.text(100, y + 40, "x")
        for target in (10, 40, 70):
            it.arrow(114, y + 36, 186, y + target)
        it.box(190, y - 4, 190, 24)
        it.text(285, y + 13, "W0 x, frozen", "", "middle")
        it.box(190, y + 28, 190, 24, COLOURS[language])
        it.text(285, y + 45, f"B A x of {language}", "on", "middle")
        it.box(190, y + 60, 190, 24, COLOURS[task])
        it.text(285, y + 77, f"B A x of {task}", "on", "middle")
        for source in (10, 40, 70):
            it.arrow(382, y + source, 452, y + 36)
        it.text(458, y + 43, "Σ", "bold")
        it.arrow(474, y + 38, 524, y + 38)
        it.text(532, y + 43, f"y of row {n}")
    it.text(
        16,
        290,
        "Backward, each update learns from the rows that name it, and from no others.",
        "soft",
    )
    return it


def dropout() -> Drawing:
    """Feature dropout hides features of some rows in some steps."""
    it = Drawing(
        "dropout",
        680,
        216,
        "Feature dropout: in some steps a row trains without its language, so the task learns to work alone",
    )
    it.text(16, 24, "The same row in four steps, with dropout of 0.5 on the language:", "bold")
    for n, gone in enumerate([False, True, True, False]):
        x = 16 + n * 166
        it.box(x, 42, 150, 96)
        it.text(x + 75, 62, f"step {n + 1}", "soft", "middle")
        it.chip(x + 10, 82, "swa", gone=gone)
        it.chip(x + 78, 82, "NER")
        it.text(x + 75, 127, "NER alone" if gone else "swa + NER", "soft", "middle")
    it.text(
        16,
        168,
        "What is common to all languages goes into NER, since NER must sometimes do without swa.",
        "soft",
    )
    it.text(
        16,
        188,
        "Masks depend on the seed, the step and the row alone: alike in every framework, and after a resume.",
        "soft",
    )
    return it


def zero_shot() -> Drawing:
    """A table of cells: two trained on each side, one composed."""
    it = Drawing(
        "zero-shot",
        680,
        248,
        "Three of four combinations of language and task are trained; the fourth is the sum of two trained features",
    )
    it.text(16, 24, "Trained on three cells ...", "bold")
    it.chip(120, 44, "NER", 104)
    it.chip(232, 44, "topic", 104)
    for n, language in enumerate(LANGUAGES):
        it.chip(16, 86 + n * 58, language, 92)
        for k in range(2):
            x, y = 120 + k * 112, 76 + n * 58
            if (n, k) == (1, 0):
                it.parts.append(
                    f'<rect x="{x}" y="{y}" width="104" height="46" rx="4" class="gone"/>'
                )
                it.text(x + 52, y + 28, "no data", "soft", "middle")
            else:
                it.box(x, y, 104, 46)
                it.text(x + 52, y + 28, "trained", "", "middle")
    it.text(400, 24, "... the fourth is composed.", "bold")
    it.chip(400, 86, "yor")
    it.text(478, 103, "+")
    it.chip(500, 86, "NER")
    it.text(400, 136, "yor learned Yoruba from topic,", "soft")
    it.text(400, 154, "NER learned names from Swahili.", "soft")
    it.text(
        16,
        222,
        "registry.encode([{language: yor, task: NER}]): a row like any other. Keep such cells out of training",
        "soft",
    )
    it.text(16, 240, "(held_out), and you can measure how well it works.", "soft")
    return it


ROWS = {
    "frozen model": ("frozen model", ""),
    "**flix**": ("flix, 12 compositions in the batch", "a"),
    "PEFT, one LoRA of rank 16 for all rows": ("PEFT, one LoRA for all rows", "b"),
    "PEFT, loop over the batch's compositions": ("PEFT, a loop over the compositions", "b"),
}


def measured() -> dict[str, float]:
    """A training step's time over that of the frozen model, from docs/speed.md, for T5-small's size."""
    page = (HERE / "speed.md").read_text(encoding="utf-8")
    table = page.split("<!-- bench:model-t5 -->")[1].split("| training step |")[1]
    return {
        row: float(re.search(rf"^\| {re.escape(row)} \| [\d.]+ \| ([\d.]+)", table, re.M)[1])  # type: ignore[index]
        for row in ROWS
    }


def speed() -> Drawing:
    """A training step of a mixed batch."""
    found = measured()
    said = "; ".join(f"{ROWS[row][0]} {value:.2f}" for row, value in found.items())
    it = Drawing(
        "speed", 460, 266, f"Training step of a mixed batch over the frozen model's: {said}"
    )
    it.text(16, 24, "A training step of a mixed batch, over the frozen", "bold")
    it.text(16, 42, "model's (lower is better)", "bold")
    for n, (row, value) in enumerate(found.items()):
        y, (label, colour) = 58 + n * 42, ROWS[row]
        it.text(16, y + 12, label)
        it.box(16, y + 17, value * 210, 16, colour or "line")
        it.text(24 + value * 210, y + 30, f"{value:.2f}", "bold")
    it.text(16, 242, "T5-small's size, two features a row, CPU, one thread.", "soft")
    it.text(16, 258, "What flix costs says how it was measured.", "soft")
    return it


ARMS = {
    "FLix, language + task + family + shared": ("FLix", "a"),
    "LoRA, equal parameters": ("LoRA, equal parameters", "b"),
    "LoRA, equal compute": ("LoRA, equal compute", "line"),
}
CELLS = [
    "Combinations seen in training (73)",
    "Of these, low-resource",
    "Combinations that were never trained (8)",
]


def scored() -> dict[str, list[float]]:
    """The quickstart's exact match of each method, from docs/quickstart.md: seen, low-resource, zero-shot."""
    page = (HERE / "quickstart.md").read_text(encoding="utf-8")
    table = page.split("| exact match, % | seen (73 cells) |")[1].split("\n\n")[0]
    found = {}
    for arm in ARMS:
        row = re.search(rf"^\| {re.escape(arm)}.*$", table, re.M)[0]  # type: ignore[index]
        found[arm] = [float(cell.strip(" *")) for cell in row.split("|")[2:5]]
    return found


def quickstart() -> Drawing:
    """The scores of the quickstart's three methods."""
    found = scored()
    said = "; ".join(f"{ARMS[arm][0]} {', '.join(map(str, of))}" for arm, of in found.items())
    it = Drawing("quickstart", 460, 338, f"Exact match on test items: {said}")
    it.text(16, 24, "make quickstart: exact match on test items, %", "bold")
    for n, cell in enumerate(CELLS):
        y = 38 + n * 94
        it.text(16, y + 14, cell)
        for k, (arm, of) in enumerate(found.items()):
            (label, colour), top = ARMS[arm], y + 20 + k * 21
            it.box(16, top, of[n] * 4.4, 18, colour)
            it.text(24 + of[n] * 4.4, top + 14, f"{of[n]:.1f} {label}", "" if k else "bold")
    it.text(16, 330, "The LoRA of equal parameters does 5× the arithmetic.", "soft")
    return it


DRAWINGS = {
    "features": features,
    "routing": routing,
    "composition": composition,
    "dropout": dropout,
    "zero-shot": zero_shot,
    "speed": speed,
    "quickstart": quickstart,
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
