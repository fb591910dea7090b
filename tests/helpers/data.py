"""Small made-up datasets whose rows know who they are."""

from __future__ import annotations

from typing import Any

import pytest

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

Pair = tuple[Any, dict[str, Any]]


def rows_of(language: str, task: str, count: int) -> Pair:
    """Rows that the source speaks for."""
    texts = [f"{language}-{task}-{i}" for i in range(count)]
    return datasets.Dataset.from_dict({"text": texts}), {"language": language, "task": task}


SIZES = {("hau", "ner"): 50, ("swa", "ner"): 20, ("hau", "topic"): 30, ("swa", "topic"): 10}
HELD_OUT = [{"language": "swa", "task": "topic"}]
