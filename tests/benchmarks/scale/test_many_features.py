"""Hundreds of features: the guard sees what it must, and figures come out for every number of features."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks.guards import GuardError  # noqa: E402
from benchmarks.scale import many_features  # noqa: E402

SIZES = many_features.Sizes(layers=2, d=8, rank=2, rows=3, length=2)


def test_all_figures_come_out():
    result = many_features.measure((4, 8), SIZES, rounds=2)
    step, files = result.tables
    assert [row[0] for row in step.rows] == [row[0] for row in files.rows] == ["4", "8"]
    assert all(len(row) == len(table.columns) for table in result.tables for row in table.rows)
    assert step.rows[1][1] > step.rows[0][1] > 0  # trainable tensors
    bars = {bar.what.rpartition("features, ")[2]: bar for bar in result.bars}
    assert bars["trainable tensors"].limit == 1.05 * 8
    assert set(bars) == {
        "trainable tensors",
        "step over 4",
        "clip, AdamW and zero_grad, ms",
        "adapt, s",
        "optimizer saved, s",
        "save, s",
        "load, s",
    }
    assert all(value > 0 for row in files.rows for value in row[1:])


def test_batches_draw_from_all_features_and_take_turns():
    candidate = many_features.Candidate(8, SIZES)
    batches = [next(candidate.batches) for _ in range(2 * many_features.BATCHES)]
    first, again = batches[: many_features.BATCHES], batches[many_features.BATCHES :]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    drawn = np.concatenate([candidate.drawn(number).numpy() for number in range(20)])
    assert set(drawn[:, 0]) == {0, 1, 2, 3}
    assert set(drawn[:, 1]) == {4, 5, 6, 7}


def test_an_update_that_is_not_computed_is_caught(monkeypatch):
    candidate = many_features.Candidate(4, SIZES)
    candidate.guard()
    plain = type(candidate.model).forward

    def wrong(self, *args, **kwargs):
        return plain(self, *args, **kwargs) * 1.01

    monkeypatch.setattr(type(candidate.model), "forward", wrong)
    with pytest.raises(GuardError, match="differs from the reference"):
        candidate.guard()


def test_a_gradient_for_a_feature_that_no_row_uses_is_caught(monkeypatch):
    candidate = many_features.Candidate(40, SIZES)
    plain = many_features.other_gradients

    def all_of_them(pairs, parameters):
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return plain(pairs, parameters)

    monkeypatch.setattr(many_features, "other_gradients", all_of_them)
    with pytest.raises(GuardError, match="that no row uses have gradients"):
        candidate.guard()
