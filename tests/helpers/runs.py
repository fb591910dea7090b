"""Folders of runs as training leaves them, made up: a real adapter, scores, logs, predictions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import flix
from flix.core.adapter.adapter import Adapter, LayerShape, expected_tensors
from flix.core.adapter.described import Base
from flix.core.adapter.files import save_adapter
from flix.core.features.cells import cell_name, cell_of

KINDS = {
    "ner": ("tagging", "entity_f1"),
    "topic": ("classification", "accuracy"),
    "mt": ("seq2seq", "chrf"),
}
HEBREW, ARABIC = "שלום עולם, 3 ימים", "مرحبا بالعالم 42"


def similar_adapter(
    languages: Sequence[str], tasks: Sequence[str], layers: int = 4, size: int = 16, seed: int = 0
) -> Adapter:
    """An adapter in which each five languages, and each five tasks, are a family; the first two are nearly one."""
    groups = {"language": list(languages), **({"task": list(tasks)} if tasks else {})}
    config = flix.FlixConfig(
        registry=flix.FeatureRegistry(groups), ranks={"language": 2, **({"task": 4} if tasks else {})}, alpha=3.0
    )  # fmt: skip
    shapes = {
        f"encoder.block.{i // 2}.{'qv'[i % 2]}": LayerShape(size, size + 4) for i in range(layers)
    }
    rng = np.random.default_rng(seed)
    shared: dict[tuple[str, tuple[int, ...]], Any] = {}
    tensors = {}
    for name, shape in expected_tensors(config, shapes):
        layer_part, number = next(
            (name.removesuffix(f".{feature}"), number)
            for group, names in groups.items()
            for number, feature in enumerate(names)
            if name.endswith(f".{group}.{feature}")
        )
        family = (f"{layer_part}.{number // 5}", shape)
        if family not in shared:
            shared[family] = rng.normal(size=shape)
        own = 0.1 if number < 2 else 0.6 + 0.2 * (number % 5)
        values = 0.1 * (shared[family] + own * rng.normal(size=shape))
        tensors[name] = values.astype(np.float32)
    return Adapter(config, shapes, tensors, base=Base(name="tiny/t5"))


def write_json(folder: Path, name: str, data: Any) -> None:
    (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def write_lines(folder: Path, name: str, lines: Sequence[Any]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / name).write_text(text, encoding="utf-8")


def make_run(
    folder: Path,
    languages: Sequence[str] = ("hau", "swa", "yor"),
    tasks: Sequence[str] = ("ner", "topic"),
    *,
    held_out: Sequence[tuple[str, str]] = (("yor", "topic"),),
    lift: float = 0.0,
    seed: int = 0,
    layers: int = 4,
    size: int = 16,
    samples: int = 4,
    steps: int = 400,
) -> Path:
    """A finished run's folder.

    Args:
        folder: where; its name is the run's.
        languages, tasks: the features; without tasks there is one group alone.
        held_out: cells that were never trained on.
        lift: added to every score.
        seed: of everything.
        layers, size: of the adapter.
        samples: examples of a cell.
        steps: steps of the run.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    save_adapter(similar_adapter(languages, tasks, layers, size), folder / "adapter")
    rows = [
        {"language": [a], **({"task": [b]} if b else {})} for a in languages for b in tasks or [""]
    ]
    names = [cell_name(cell_of(row)) for row in rows]
    held = [(row["language"][0], row.get("task", [""])[0]) in held_out for row in rows]
    features = [f"language={a}" for a in languages] + [f"task={b}" for b in tasks]
    kinds = [
        KINDS.get(row.get("task", [""])[0].rstrip("0123456789"), ("seq2seq", "exact_match"))
        for row in rows
    ]
    _write_scores(folder, names, rows, held, kinds, features, lift, rng)
    _write_mixture(folder, names, rows, held, rng)
    _write_log(folder, names, features, steps, rng)
    _write_predictions(folder, names, [kind for kind, _ in kinds], samples, rng)
    write_json(folder, "run.json", {
        "command": ["flix", "train", "africa ner.yaml", "--resume"], "started": "2026-11-27T10:30:00Z",
        "seconds": 1312.4, "steps": steps, "seed": seed,
        "versions": {"flix": "0.1", "python": "3.12.1", "torch": "2.13.0"},
        "machine": {"system": "Linux", "processors": 2, "device": "cpu"},
        "data": [{"name": "ner", "files": [{"name": "ner/hau.train.jsonl.gz", "bytes": 1200, "sha256": "ab" * 32}], "rows": 90, "evaluation": False}],
        "parameters": {"base": 22_000_000, "trainable": 64_000, "by_feature": dict.fromkeys(features, 1000)},
        "cost": {"seconds_a_step": 0.31, "tokens": 1_200_000, "peak_memory_bytes": 2**30},
    })  # fmt: skip
    (folder / "config.yaml").write_text("model: tiny/t5\nkind: seq2seq\n", encoding="utf-8")
    return folder


_LANGUAGES = "hau swa yor zul xho ibo amh orm som tir pcm eng fra por ara heb kin lug wol twi ewe fon bam mos nya sna tsn ven run lin"
_TASKS = "ner1 ner2 topic1 topic2 mt1 mt2 pos lemma gec sentiment xnli qa"


def make_large(folder: Path) -> Path:
    """A run of 30 languages and 12 tasks, with 48 layers and 20 examples of a cell."""
    languages, tasks = _LANGUAGES.split(), _TASKS.split()
    held_out = [*(("lin", task) for task in tasks[:6]), ("ven", "qa"), ("hau", "mt1")]
    return make_run(folder, languages, tasks, held_out=held_out, layers=48, size=64, samples=20, steps=3000)  # fmt: skip


def _write_scores(
    folder: Path, names: Sequence[str], rows: Sequence[Any], held: Sequence[bool],
    kinds: Sequence[tuple[str, str]], features: Sequence[str], lift: float, rng: np.random.Generator,
) -> None:  # fmt: skip
    cells = []
    for name, row, out, (kind, metric) in zip(names, rows, held, kinds, strict=True):
        score = float(np.clip(rng.normal(28 if out else 46, 9), 1, 99)) + lift
        cells.append({
            "cell": name, "features": row, "kind": kind, "task": row.get("task", [""])[0], "seen": not out, "rows": 200,
            "metric": metric, "score": score, "interval": [score - 3, score + 3], "scores": {metric: score, "loss": 1.5},
        })  # fmt: skip
    left = {
        name: {"loss": 1.2, "without": 1.2 + abs(rng.normal(0, 0.3)), "rows": 90}
        for name in features
    }
    write_json(folder, "metrics.json", {"cells": cells, "left_out": left})


def _write_mixture(
    folder: Path, names: Sequence[str], rows: Sequence[Any], held: Sequence[bool], rng: np.random.Generator
) -> None:  # fmt: skip
    sizes = [int(10 ** rng.uniform(2, 4.5)) for _ in names]
    weights = [0.0 if out else size**0.5 for out, size in zip(held, sizes, strict=True)]
    cells = [
        {
            "cell": name, "features": row, "rows": size, "counted": size, "probability": weight / sum(weights),
            "drawn": round(10_000 * weight / sum(weights)), "held_out": out, "evaluation_rows": 200,
        }
        for name, row, out, size, weight in zip(names, rows, held, sizes, weights, strict=True)
    ]  # fmt: skip
    write_json(
        folder,
        "mixture.json",
        {"temperature": 2.0, "cap": None, "epoch_size": 5000, "cells": cells},
    )


def _write_log(
    folder: Path, names: Sequence[str], features: Sequence[str], steps: int, rng: np.random.Generator
) -> None:  # fmt: skip
    lines: list[Any] = []
    floors = {name: rng.uniform(0.5, 1.5) for name in features}
    for step in range(10, steps + 1, 10):
        fall = float(np.exp(-step / 150))
        lines.append({
            "step": step, "seconds": 0.3 * step, "loss": 1 + 2 * fall + rng.normal(0, 0.05), "learning_rate": 1e-3,
            "grad_norm": 1.0, "by_feature": {n: f + 2 * fall + rng.normal(0, 0.1) for n, f in floors.items()},
        })  # fmt: skip
        if step % 50 == 0:
            lines.append({"step": step, "seconds": 0.3 * step, "evaluation": {
                "loss": 1.1 + 2 * fall, "seen": 1.1 + 2 * fall, "held_out": 1.6 + 1.5 * fall,
                "scores": {"seen": 50 * (1 - fall), "held_out": 30 * (1 - fall)}, "by_feature": {n: f + 2 * fall for n, f in floors.items()},
                "cells": {name: {"loss": 1.0 + fall, "score": 50 * (1 - fall)} for name in names},
            }})  # fmt: skip
    write_lines(folder, "log.jsonl", lines)


def _write_predictions(
    folder: Path, names: Sequence[str], kinds: Sequence[str], samples: int, rng: np.random.Generator
) -> None:  # fmt: skip
    texts = [
        HEBREW,
        ARABIC,
        "the river rose in the night and took the bridge",
        "mto ulipanda usiku",
    ]
    lines = []
    for name, kind in zip(names, kinds, strict=True):
        for number in range(samples):
            right = bool(rng.random() < 0.4)
            source = f"{texts[number % len(texts)]} {number}"
            target = f"{texts[(number + 1) % len(texts)]}"
            lines.append({
                "cell": name, "kind": kind, "source": source, "target": target,
                "output": target if right else source, "right": right,
            })  # fmt: skip
    write_lines(folder, "predictions.jsonl", lines)
