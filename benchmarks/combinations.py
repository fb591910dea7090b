"""Ways to serve combinations that were never trained, on the quickstart's tuning cells.

    python -m benchmarks.combinations [--steps 1500] [--seed 0]

Trains the quickstart's FLix arm, then scores each held-out cell of the tuning half, all 60 test examples of it, under
the task with the weight 0 and 1 of the language, the mean of all languages, its nearest relatives in a family tree,
and with weights that were searched on 32 of the cell's dev examples. Prints a table for docs/method.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import flix
from flix.backends.torch import search_weights
from flix.quickstart.arms import BASE, FLIX, configuration
from flix.quickstart.data import Example, load_data
from flix.training.run import train
from flix.training.settings import Settings

# Of the quickstart's languages; those alone in their branch have no relative.
TREE = {
    "de": "germanic", "sv": "germanic", "es": "romance", "fr": "romance", "ru": "slavic", "cs": "slavic",
    "slavic": "balto-slavic", "lt": "balto-slavic", "hu": "uralic", "fi": "uralic",
}  # fmt: skip
SEARCHES: dict[str, dict[str, Any]] = {
    "searched, languages, gradient": {"groups": ["language"]},
    "searched, all groups, gradient": {},
    "searched, languages, evolution": {"groups": ["language"], "method": "evolution", "steps": 20},
}


def batch_of(examples: Sequence[Example], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Examples as a model takes them."""
    batch = dict(tokenizer([e.source for e in examples], padding=True, return_tensors="pt"))
    said = tokenizer([e.target for e in examples], padding=True, return_tensors="pt")
    batch["labels"] = said["input_ids"].masked_fill(said["attention_mask"] == 0, -100)
    return batch


@torch.no_grad()
def exact(model: Any, tokenizer: Any, cell: Any, row: Any) -> float:
    """Exact match on a cell's test examples under a row, in percent."""
    batch = batch_of(cell.test, tokenizer)
    del batch["labels"]
    routing = model.flix_config.registry.encode([row] * len(cell.test))
    found = model.generate(
        **batch,
        flix_features=torch.from_numpy(routing.ids),
        flix_weights=torch.from_numpy(routing.weights),
        max_new_tokens=72,
        do_sample=False,
    )
    said = tokenizer.batch_decode(found, skip_special_tokens=True)
    return 100.0 * float(np.mean([a == e.target for a, e in zip(said, cell.test, strict=True)]))


def rows_of(cell: Any, languages: tuple[str, ...]) -> dict[str, Any]:
    """The rows that need no examples."""
    others = flix.FeatureRegistry(
        {"language": [name for name in languages if name != cell.language]}
    )
    relatives = flix.by_parents(others, "language", TREE).get(cell.language, [])
    nearest = {name: 1 / len(relatives) for name in relatives} or {cell.language: 0.0}
    shares = dict.fromkeys(languages, 1 / len(languages))
    return {
        "language's weight 0": {"language": {cell.language: 0.0}, "task": cell.task},
        "language's weight 1": {"language": cell.language, "task": cell.task},
        "mean of all languages": {"language": shares, "task": cell.task},
        "nearest relatives": {"language": nearest, "task": cell.task},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.combinations")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    data = load_data()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with tempfile.TemporaryDirectory() as folder:
        chosen = configuration(
            data, FLIX, seed=options.seed, steps=options.steps, limit=1, output=Path(folder) / "run"
        )
        model = train(Settings.model_validate(chosen)).model
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in data.zero_shot("tuning"):
        rows = {name: (row, 0.0) for name, row in rows_of(cell, data.languages).items()}
        start = rows["language's weight 0"][0]
        for name, settings in SEARCHES.items():
            began = time.monotonic()
            searched = search_weights(model, batch_of(cell.dev[:32], tokenizer), start, **settings)
            rows[name] = (searched.row, time.monotonic() - began)
        for name, (row, seconds) in rows.items():
            found.setdefault(name, []).append((exact(model, tokenizer, cell, row), seconds))
        print(
            cell.name, {name: round(values[-1][0], 1) for name, values in found.items()}, flush=True
        )
    print("\n| combination's weights | exact match | seconds to find |\n| --- | --- | --- |")
    for name, values in found.items():
        score, seconds = np.mean(values, 0)
        print(f"| {name} | {score:.1f} | {f'{seconds:.0f}' if seconds else '–'} |")


if __name__ == "__main__":
    main()
