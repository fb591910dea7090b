"""Rows dealt to batches by length."""

from __future__ import annotations

import itertools
import random

import pytest

from flix.core.features.cells import MixtureError
from flix.data.lengths import SimilarLengths


class Rows:
    """Rows that count how often they are read."""

    def __init__(self, lengths):
        self.lengths, self.read = lengths, 0

    def __len__(self):
        return len(self.lengths)

    def __getitems__(self, positions):
        self.read += len(positions)
        return [{"number": i, "length": self.lengths[i]} for i in positions]


def dealt(count=150, batch=8, seed=0, batches=4):
    generator = random.Random(1)
    rows = Rows([generator.randrange(1, 60) for _ in range(count)])
    return rows, SimilarLengths(rows, batch, lambda r: r["length"], seed=seed, batches=batches)


def test_every_row_comes_once_and_stays_in_its_stretch():
    rows, found = dealt()
    order = [row["number"] for row in found.__getitems__(range(len(found)))]
    assert sorted(order) == list(range(150)) and len(found) == 150
    assert all(number // 32 == place // 32 for place, number in enumerate(order))
    assert order != sorted(order)
    assert rows.read == 150  # each is read once, where positions are asked for in order


def test_batches_hold_similar_lengths_and_come_in_no_order_of_length():
    rows, found = dealt(count=3200)
    padding = {}
    for name, read in (("as they come", rows), ("dealt", found)):
        batches = [read.__getitems__(range(i, i + 8)) for i in range(0, 3200, 8)]
        widths = [max(row["length"] for row in batch) for batch in batches]
        padding[name] = 8 * sum(widths) / sum(rows.lengths) - 1
        if name == "dealt":
            rising = sum(a <= b for a, b in itertools.pairwise(widths))
            assert 0.35 < rising / len(widths) < 0.65
    assert padding["dealt"] < 0.5 * padding["as they come"]


def test_a_position_tells_its_row_whatever_was_read_before():
    _, found = dealt()
    whole = [row["number"] for row in found.__getitems__(range(150))]
    _, again = dealt()
    for place in (149, 3, 77, 3, 40):
        assert again[place]["number"] == whole[place]
    other = [row["number"] for row in dealt(seed=1)[1].__getitems__(range(150))]
    assert other != whole and sorted(other) == sorted(whole)


def test_a_batch_that_is_not_full_stays_the_last():
    _, found = dealt(count=45, batch=8, batches=4)
    last = [row["length"] for row in found.__getitems__(range(40, 45))]
    assert last == sorted(last)
    assert min(last) >= max(row["length"] for row in found.__getitems__(range(32, 40)))


def test_what_does_not_exist_is_refused():
    _, found = dealt()
    with pytest.raises(IndexError, match="position 150 of a run of 150 rows"):
        found[150]
    with pytest.raises(MixtureError, match="the rows of a batch"):
        SimilarLengths([], 0, len)
    with pytest.raises(MixtureError, match="the batches of a stretch"):
        SimilarLengths([], 4, len, batches=0)
