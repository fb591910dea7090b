"""The configuration of the features that settings and rows lead to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flix.training.models import build_config
from flix.training.reading import read_settings
from tests.helpers.training import data_of


def test_ranks_by_rows(config: Callable[..., Path]) -> None:
    path = config(ranks={"rule": "proportional", "budget": 30})
    ranks = build_config(read_settings(path), data_of(path)).ranks
    assert sum(ranks.values()) == 30 and ranks["shared", "all"] == max(ranks.values())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ranks", "total"),
    [
        (4, 28),
        ({"rule": "explicit", "ranks": {"task": 1, "language": {"hau": 2, "swa": 3, "yor": 4}, "shared": 1}}, 13),
        ({"rule": "compute_matched", "lora_rank": 9}, 21),
        ({"rule": "parameter_matched", "lora_rank": 16}, 16),
    ],
)  # fmt: skip
def test_every_rank_rule(config: Callable[..., Path], ranks: Any, total: int) -> None:
    path = config(ranks=ranks)
    assert sum(build_config(read_settings(path), data_of(path)).ranks.values()) == total  # type: ignore[union-attr]
