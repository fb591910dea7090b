"""What is drawn when."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flix.training.mixture import Mixture
from tests.helpers.training import corpus_of


def test_mixture_is_a_function_of_seed_and_position(config: Callable[..., Path]) -> None:
    corpus = corpus_of(config())
    mixture = Mixture(corpus.train, length=10_000, temperature=2.0, seed=5)
    whole = mixture.draw(range(10_000))
    assert np.array_equal(whole[700:900], mixture.draw(range(700, 900)))
    assert mixture[17].row is corpus.train.rows[whole[17]] and mixture[17].position == 17
    other = Mixture(corpus.train, length=10_000, temperature=2.0, seed=6)
    assert not np.array_equal(whole, other.draw(range(10_000)))
    drawn = {corpus.names[c] for c in corpus.train.cells[whole].tolist()}
    assert len(drawn) == 8 and "task=rev,language=yor" not in drawn
    assert len(set(whole.tolist())) == len(corpus.train)


def test_mixture_shows_all_rows_of_a_cell_before_any_again(config: Callable[..., Path]) -> None:
    corpus = corpus_of(config())
    mixture = Mixture(corpus.train, length=1, temperature=2.0, seed=5)
    # The length of a run changes no row of it: a run can be resumed for more steps.
    longer = Mixture(corpus.train, length=999, temperature=2.0, seed=5)
    drawn = mixture.draw(range(333))
    assert np.array_equal(drawn, longer.draw(range(333)))
    epochs = mixture.draw(range(3 * len(corpus.train)))
    counts = np.bincount(epochs, minlength=len(corpus.train))
    for cell in np.unique(corpus.train.cells):
        own = counts[corpus.train.cells == cell]
        assert own.max() - own.min() <= 1


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_mixture_follows_the_temperature(
    tmp_path: Path, config: Callable[..., Path], temperature: float
) -> None:
    lines = [{"l": "a"}] * 900 + [{"l": "b"}] * 100
    text = "".join(
        json.dumps({**r, "source": str(i), "target": "t"}) + "\n" for i, r in enumerate(lines)
    )
    (tmp_path / "d.jsonl").write_text(text, encoding="utf-8")
    path = config(
        datasets=[{"files": "d.jsonl", "feature_columns": {"l": "l"}}],
        held_out=[],
        implies={},
        ranks=1,
    )
    corpus = corpus_of(path)
    mixture = Mixture(corpus.train, length=1, temperature=temperature, seed=0)
    share = np.mean(corpus.train.cells[mixture.draw(range(40_000))] == 0)
    wanted = 9 ** (1 / temperature) / (1 + 9 ** (1 / temperature))
    assert abs(share - wanted) < 0.01
