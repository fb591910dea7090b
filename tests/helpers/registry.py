"""The features, ranks and rows that most tests use: no framework is needed."""

from __future__ import annotations

from typing import Any

import numpy as np

import flix

LANGUAGES = ["hau", "swa", "yor", "zul"]  # ids 0 to 3
TASKS = ["ner", "pos"]  # ids 4 and 5

# One feature of each group; several with weights; several of one group; none.
ROWS: list[Any] = [
    {"language": "hau", "task": "ner"},
    {"language": {"swa": 0.5, "yor": -1.5}, "task": "pos"},
    {"task": ["ner", "pos"]},
    {},
]

# As arrays made by hand can be: padding first and last, a feature twice, rank 0 (id 2), weights that are negative and
# 0, an empty row.
IDS = np.array([[0, 4, -1], [1, 5, 2], [3, 3, 5], [-1, -1, -1], [-1, 4, 1]], np.int32)
WEIGHTS = np.array([[1, 0.5, 0], [-1.5, 2, 1], [0.25, 1, 0], [0, 0, 0], [0, 1, -0.5]], np.float32)


def registry(**changes: Any) -> flix.FeatureRegistry:
    return flix.FeatureRegistry({"language": LANGUAGES, "task": TASKS}, **changes)


def config(**changes: Any) -> flix.FlixConfig:
    """Unequal ranks, one of them 0, and an alpha that makes scales other than 1."""
    settings: dict[str, Any] = {
        "registry": registry(),
        "ranks": {
            "language": {"hau": 1, "swa": 3, "yor": 0, "zul": 2},
            "task": {"ner": 2, "pos": 4},
        },
        "alpha": {"task": 3.0},
    }
    return flix.FlixConfig(**{**settings, **changes})
