"""A training configuration with comments, drafted from a look at data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flix.cli.guessing import GENERATIVE, Guess
from flix.cli.looking import Looked, relative
from flix.core.features.cells import Cell, cell_name

MODELS = {
    "seq2seq": "google/mt5-small",
    "causal": "Qwen/Qwen2.5-0.5B",
    "other": "FacebookAI/xlm-roberta-base",
}
"""What is suggested where no model is said."""
_PLAIN = re.compile(r"[A-Za-z_./][\w./*-]*(?:\{\w+\}[\w./*-]*)*")
_READ = {"yes", "no", "on", "off", "true", "false", "null", "y", "n", "~"}


def rows_of(looked: Sequence[Looked]) -> dict[Cell, int]:
    """Rows for training by cell, over all data sets."""
    found: dict[Cell, int] = {}
    for one in looked:
        for cell, count in one.cells.items():
            found[cell] = found.get(cell, 0) + count
    return found


def features_of(cells: Mapping[Cell, int]) -> dict[str, dict[str, int]]:
    """Rows by group and feature."""
    found: dict[str, dict[str, int]] = {}
    for cell, count in cells.items():
        for group, names in cell:
            for name in names:
                of = found.setdefault(group, {})
                of[name] = of.get(name, 0) + count
    return found


def suggest_temperature(cells: Mapping[Cell, int]) -> float:
    """1 for cells of one size, more the more unequal they are."""
    sizes = [count for count in cells.values() if count]
    ratio = max(sizes) / min(sizes) if sizes else 1.0
    return 1.0 if ratio <= 3 else 2.0 if ratio <= 100 else 3.0 if ratio <= 3000 else 5.0


def suggest_ranks(features: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """A rank for each group, by the rows of its middle feature; the group with fewest features gets twice that."""
    found = {}
    for group, rows in features.items():
        middle = sorted(rows.values())[len(rows) // 2]
        found[group] = 2 if middle < 1000 else 4 if middle < 20_000 else 8
    if len(found) > 1:
        fewest = min(features, key=lambda group: len(features[group]))
        found[fewest] *= 2
    return found


def suggest_held_out(cells: Mapping[Cell, int]) -> Cell | None:
    """A cell whose features all occur elsewhere, too: one of the smallest."""
    for cell in sorted(cells, key=lambda c: cells[c]):
        others = [feature for other in cells if other != cell for feature in other]
        if len(cell) > 1 and all(feature in others for feature in cell):
            return cell
    return None


def suggest_steps(cells: Mapping[Cell, int], batch: int) -> int:
    """About three times through the rows, within reason."""
    steps = min(max(3 * sum(cells.values()) // batch, 300), 20_000)
    return steps // 100 * 100


def draft(looked: Sequence[Looked], guesses: Sequence[Guess], model: str | None, out: Path) -> str:
    """The configuration.

    Args:
        looked: the data sets.
        guesses: the kind of each.
        model: the base model; default: a suggestion.
        out: where the configuration will stand; its files are named from there.

    Returns:
        YAML that :func:`flix.training.read_settings` reads.
    """
    rows: dict[str, int] = {}
    for one, guess in zip(looked, guesses, strict=True):
        rows[guess.kind] = rows.get(guess.kind, 0) + one.rows
    kind = max(rows, key=lambda kind: rows[kind])
    cells = rows_of(looked)
    features = features_of(cells)
    parts = [
        *_head(model, kind, out),
        "",
        "datasets:",
        *(line for one, guess in zip(looked, guesses, strict=True) for line in _dataset(one, guess, kind, out)),
        "",
        *_unseen(looked, cells),
        "",
        *_mixing(cells, features),
        "",
        *_training(cells, kind),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _head(model: str | None, kind: str, out: Path) -> Iterator[str]:
    yield "# Drafted by flix init: read it, change it, then"
    yield f"#   flix plan {out.name}     # ranks and parameters, compared with the matched LoRAs"
    yield f"#   flix train {out.name}"
    said = model or MODELS.get(kind, MODELS["other"])
    what = (
        ""
        if model
        else "   # a suggestion: any checkpoint for these languages, a folder or a hub name"
    )
    yield f"model: {scalar(said)}{what}"
    yield f"kind: {kind}                # of the data sets that say no other"
    yield f"output: {scalar(f'runs/{out.stem}')}"


def _dataset(one: Looked, guess: Guess, kind: str, out: Path) -> Iterator[str]:
    files, folder = one.files, out.parent
    said = f", {guess.labels} labels" if guess.labels else ""
    yield f"  # {one.rows:,} rows in {_counted(len(one.cells), 'cell')}{said}"
    yield f"  - files: {scalar(relative(files.pattern, folder))}"
    if files.evaluation is not None:
        yield f"    eval_files: {scalar(relative(files.evaluation, folder))}"
    else:
        # Each cell must keep a row to train on.
        sizes = sorted(one.cells.values())
        rows = max(min(100, sizes[len(sizes) // 2] // 10, sizes[0] - 1), min(1, sizes[0] - 1))
        yield f"    eval_rows: {rows}   # of each cell, held back for evaluation"
    if guess.kind != kind:
        yield f"    kind: {guess.kind}"
    if files.features:
        yield f"    features: {flow(files.features)}"
    if one.feature_columns:
        yield f"    feature_columns: {flow(one.feature_columns)}"
    for what, column in guess.columns.items():
        yield f"    {what}: {scalar(column)}"
    if guess.prompt is not None:
        yield f"    prompt: {json.dumps(guess.prompt, ensure_ascii=False)}"


def _unseen(looked: Sequence[Looked], cells: Mapping[Cell, int]) -> Iterator[str]:
    yield "# Cells that are never trained on, to see what carries over to combinations without data."
    evaluated = {cell for one in looked for cell in one.evaluation_cells}
    if alone := sorted(cell_name(cell) for cell in evaluated - set(cells)):
        yield "# Evaluated, but without rows for training:"
        yield from (f"#   {_some([name], 1)}" for name in alone[:10])
        if len(alone) > 10:
            yield f"#   and {len(alone) - 10} more"
    if (cell := suggest_held_out(cells)) is None:
        yield "# held_out: [...]"
        return
    named = flow({group: "+".join(names) for group, names in cell})
    yield "# held_out:"
    yield f"#   - {named}"


def _mixing(cells: Mapping[Cell, int], features: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    sizes = [count for count in cells.values() if count] or [1]
    ratio, temperature = max(sizes) / min(sizes), suggest_temperature(cells)
    said = f"# The largest cell has {ratio:,.1f} times the rows of the smallest. At 1 it is drawn that much more often"
    yield said + (f", at {temperature:g}" if temperature != 1 else ".")
    if temperature != 1:
        yield f"# {ratio ** (1 / temperature):,.1f} times as often."
    yield "# Larger values level cells out further."
    yield f"temperature: {temperature:g}"
    yield ""
    yield "# A rank for each feature of a group, by its rows; others: flix.ranks, docs/cli.md."
    for group, rows in features.items():
        middle = sorted(rows.values())[len(rows) // 2]
        yield f"#   {group}: {_counted(len(rows), 'feature')}, {middle:,} rows in the middle: {_some(list(rows))}"
    ranks = {"rule": "by_group", **suggest_ranks(features)}
    yield f"ranks: {flow(ranks)}"
    if "language" in features and len(features) > 1:
        yield "# Leaves languages out of some rows, so that tasks also learn without them: for cells held out."
        yield "# feature_dropout: {per_group: {language: 0.2}}"
    yield "seed: 0"


def _training(cells: Mapping[Cell, int], kind: str) -> Iterator[str]:
    batch = 32 if kind not in GENERATIVE else 16
    steps = suggest_steps(cells, batch)
    yield "training:"
    yield f"  steps: {steps}              # of {batch} rows: {steps * batch / max(sum(cells.values()), 1):.1f} times the rows there are"
    yield f"  batch_size: {batch}"
    yield "  learning_rate: 0.001"
    yield f"  eval_every: {max(steps // 5, 1)}"


def scalar(value: object) -> str:
    """A value as YAML; quoted where it could be read as something else."""
    text = str(value)
    if not isinstance(value, str):
        return text
    plain = _PLAIN.fullmatch(text) and text.lower() not in _READ
    return text if plain else json.dumps(text, ensure_ascii=False)


def flow(values: Mapping[str, object]) -> str:
    """A mapping on one line."""
    return "{" + ", ".join(f"{_key(k)}: {_key(v)}" for k, v in values.items()) + "}"


def _key(value: object) -> str:
    """As :func:`scalar`, between braces."""
    text = scalar(value)
    return json.dumps(text, ensure_ascii=False) if "{" in text and text == value else text


def _some(names: Sequence[str], most: int = 8) -> str:
    """Names for a comment: no line ends in them."""
    said = [" ".join(name.split()) for name in names[:most]]
    return ", ".join(said) + (f" and {len(names) - most} more" if len(names) > most else "")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"
