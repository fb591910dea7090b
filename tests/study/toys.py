"""A tiny study: three tasks in three languages, two held-out cells, and configurations that stand on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

LANGUAGES, TASKS = ("hau", "swa", "yor"), ("ner", "pos", "rev")
CHOOSING, LAST_WORD = ("yor", "rev"), ("hau", "pos")


def make_data(folder: Path, model: Path) -> None:
    """Rows as ``TASK/LANGUAGE.SPLIT.jsonl``, ``choosing.yaml`` and ``last_word.yaml``."""
    for task in TASKS:
        (folder / task).mkdir(parents=True)
        for language in LANGUAGES:
            held = (language, task) in (CHOOSING, LAST_WORD)
            for split, count in (("train", 12), ("dev", 3), ("test", 3)):
                if (held and split == "train") or ((language, task), split) in (
                    (CHOOSING, "test"),
                    (LAST_WORD, "dev"),
                ):
                    continue
                rows = [
                    {"source": f"{language} {split} {i}", "target": f"{task[0]}{i}"}
                    for i in range(count)
                ]
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (folder / task / f"{language}.{split}.jsonl").write_text(text, encoding="utf-8")
    for name, split, (language, task) in (
        ("choosing", "dev", CHOOSING),
        ("last_word", "test", LAST_WORD),
    ):
        said: dict[str, Any] = {
            "model": str(model),
            "kind": "seq2seq",
            "datasets": [
                {
                    "files": f"{t}/{{language}}.train.jsonl",
                    "eval_files": f"{t}/{{language}}.{split}.jsonl",
                    "features": {"task": t},
                    "prompt": "{task}: {source}",
                }
                for t in TASKS
            ],
            "held_out": [{"language": language, "task": task}],
            "implies": {"task=*": "shared=all"},
            "ranks": {"rule": "by_group", "language": 1, "task": 2, "shared": 3},
            "feature_dropout": {"per_group": {"language": 0.5}},
            "training": {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "save_every": 2},
            "evaluation": {"max_new_tokens": 3, "unseen_group_weights": {"language": 0.0}},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")


def write_study(folder: Path, data: Path, **changes: Any) -> Path:
    """A study of the three main arms; keywords replace keys at the top, those that are None are left out."""
    said: Mapping[str, Any] = {
        "output": "study",
        "common": str(data / "last_word.yaml"),
        "arms": {
            "flix": {"title": "FLix"},
            "lora-compute": {"lora": {"equal_compute": "flix"}},
            "lora-parameters": {"lora": {"equal_parameters": "flix"}},
        },
        "choosing": {
            "common": str(data / "choosing.yaml"),
            "steps": 2,
            "choices": {"training.learning_rate": [0.01, 0.02]},
        },
        **changes,
    }
    path = folder / "toy.yaml"
    kept = {key: value for key, value in said.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return path
