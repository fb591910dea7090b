"""What is drawn in training, and how it is routed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("simplemma")
pytest.importorskip("sacrebleu")
from flix.quickstart.arms import FLIX, config


def test_unseen_combinations_are_served_without_the_language(data):
    torch = pytest.importorskip("torch")
    assert torch
    from flix.quickstart.training import routing_of

    seen = next(data.trained())
    new = next(data.zero_shot("test"))
    routing = routing_of(config(data, FLIX, 0), FLIX, [seen, new])
    assert routing.names(0)[("language", seen.language)] == 1.0
    assert routing.names(1)[("language", new.language)] == 0.0
    assert routing.names(1)[("task", new.task)] == 1.0


def test_the_mixture_draws_by_the_root_of_sizes_and_never_a_held_out_cell(data):
    pytest.importorskip("torch")
    from flix.quickstart.training import Mixture

    cells = list(data.trained())
    mixture = Mixture(cells, seed=0)
    counts = dict.fromkeys((cell.name for cell in cells), 0)
    for step in range(200):
        for cell, example in zip(*mixture.batch(step, 64), strict=True):
            counts[cell.name] += 1
            assert example in cell.train
    held_out = {cell.name for cell in data.zero_shot()}
    assert not held_out & {name for name, count in counts.items() if count}
    roots = np.sqrt([len(cell.train) for cell in cells])
    expected = 200 * 64 * roots / roots.sum()
    found = np.array([counts[cell.name] for cell in cells])
    assert np.abs(found - expected).max() < 6 * np.sqrt(expected.max())
    again = Mixture(cells, seed=0).batch(17, 64)[1]
    assert again == mixture.batch(17, 64)[1]
    with pytest.raises(ValueError, match="is held out; it must never be trained on"):
        Mixture([*cells, next(data.zero_shot())], seed=0)
