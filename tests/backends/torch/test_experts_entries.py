"""Which entries features act on: as they lie where rows allow it, gathered otherwise, in one piece or in several."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix.backends.torch import experts_sums as sums  # noqa: E402
from flix.backends.torch.experts_entries import Entries, Sent, row_order, together  # noqa: E402
from flix.backends.torch.grouped import Groups  # noqa: E402
from tests.helpers.mixtures import ONLY, adapted, make  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import dense_model, live_pairs, output, project_back  # noqa: E402
from tests.helpers.zoo import inputs_of  # noqa: E402

RANKS = {"language": 4, "task": 2}
MIXED = [[0, 4], [1, 4], [0, 5], [2, 5]]
ALIKE = [[0, 4]] * 4
FACTORS = [[1.0, -0.5], [0.0, 2.0], [0.5, 1.0], [1.0, 0.0]]
GAPS = [[0, 4], [1, -1], [0, 5], [-1, 4]]
TWICE = [[0, 4], [4, 1], [0, 5], [0, 0]]


def seen_shares(monkeypatch):
    """What later calls compute: whether a share has all entries, its features, and the number of pieces."""
    found = []
    own = sums.pieces

    def watched(kernel, sent, shares, **settings):
        made = own(kernel, sent, shares, **settings)
        found.append(([(s.entry is None, len(s.places)) for s in shares], len(made)))
        return made

    monkeypatch.setattr(sums, "pieces", watched)
    return found


@pytest.mark.parametrize("cached", [1 << 20, 1 << 10], ids=["whole", "pieces"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (MIXED, [(True, 3), (False, 2)]),
        (ALIKE, [(True, 1), (True, 1)]),
        (GAPS, [(False, 2), (False, 2)]),
        (TWICE, [(False, 2), (False, 2)]),
    ],
    ids=["mixed", "alike", "gaps", "twice"],
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_every_share_equals_dense_kernels(name, weighted, rows, expected, cached, monkeypatch):
    monkeypatch.setattr(sums, "_CACHED", cached)
    found = seen_shares(monkeypatch)
    model, base = adapted(name, target_modules=ONLY, ranks=RANKS), make(name)
    ids = torch.tensor(rows, dtype=torch.int32)
    factors = torch.tensor(FACTORS if weighted else [[1.0, 1.0]] * 4).double()
    inputs = inputs_of(name, rows=4, length=32)
    given = {"flix_weights": factors.requires_grad_()} if weighted else {}
    result = output(model(**inputs, flix_features=ids, **given))
    wanted, pairs, weights = dense_model(base.eval(), model, ids, factors.detach(), inputs)
    assert_close(result, wanted)
    project_back(result)
    project_back(wanted)
    live = live_pairs(model)
    assert any(pair.grad is not None for pair in live.values())
    for key, pair in live.items():
        grad = pairs[key].grad
        assert_close(
            torch.zeros_like(pair) if pair.grad is None else pair.grad,
            0 * pair if grad is None else grad,
        )
    if weighted:
        present = ids >= 0
        assert_close(factors.grad[present], weights.grad[present])
    assert all(sorted(shares) == sorted(expected) for shares, _ in found)
    assert all((pieces > 1) == (cached < 1 << 20) for _, pieces in found)


def test_gradients_that_are_differentiated_again_are_the_same(monkeypatch):
    found = seen_shares(monkeypatch)
    model = adapted(target_modules=ONLY, ranks=RANKS)
    ids = torch.tensor(MIXED, dtype=torch.int32)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(**settings):
        y = output(model(**inputs_of("qwen3-moe", rows=4, length=32), flix_features=ids))
        return torch.autograd.grad(y.square().sum(), parameters, allow_unused=True, **settings)

    for again, once in zip(gradients(create_graph=True), gradients(), strict=True):
        if once is not None:
            assert_close(again.detach(), once)
    assert all(sorted(shares) == [(False, 2), (True, 3)] for shares, _ in found)


def test_few_entries_are_not_worth_a_stack_of_all_experts(monkeypatch):
    found = seen_shares(monkeypatch)
    model = adapted(target_modules=ONLY, ranks=RANKS)
    inputs = inputs_of("qwen3-moe", rows=4, length=2)
    with torch.no_grad():
        model(**inputs, flix_features=torch.tensor(MIXED))
    assert found and all(shares == [(False, 1)] * 5 for shares, _ in found)


def test_rows_of_one_feature_come_together():
    ids = np.array(MIXED)
    order = row_order(ids)
    assert ids[order].tolist() == [[0, 4], [0, 5], [1, 4], [2, 5]]
    assert together(ids, order) == [[0, 1, 2]]
    assert together(ids, None) == [[4, 5]]  # 0 is in two stretches, the tasks are not
    assert together(np.array(ALIKE), None) == [[0], [4]]
    assert together(np.array(GAPS), row_order(np.array(GAPS))) == []
    assert together(np.array([[0, 4], [4, 1]]), None) == []  # 4 is in both columns
    assert row_order(np.empty((3, 0), int)).tolist() == [0, 1, 2]
    assert together(np.empty((0, 2), int), None) == []


def test_factors_lie_as_the_entries_do():
    of = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    row = torch.tensor([0, 2, 1, 3, 0, 2, 1, 3])
    ids, order = np.array(MIXED), np.array([0, 2, 1, 3])
    sent = Sent(Groups(of, 2), row, row)
    entries = Entries(ids, range(6), sent, order)
    weights = torch.arange(8.0).view(4, 2)
    factors = entries.factors(weights)
    for share in entries.shares([0, 1, 2, 4, 5], [1] * 6, [1.0] * 6, True):
        (feature,) = ([0, 1, 2, 4, 5][place] for place in share.places)
        where = (torch.tensor(MIXED)[row[share.entry]] == feature).nonzero()[:, 1]
        assert torch.equal(factors[share.span], weights[row[share.entry], where])
    assert torch.equal(entries.scattered(factors, weights), weights * 2)  # each row is twice here


def test_a_part_of_groups_counts_from_its_own_first_row():
    groups = Groups(torch.tensor([0, 0, 1, 3, 3, 3]), 4)
    part, rows = groups.part(1, 4)
    assert (rows.start, rows.stop) == (2, 6)
    assert part.of.tolist() == [0, 2, 2, 2] and part.ends.tolist() == [1, 1, 4]
    assert part.spans == [(0, 0, 1), (2, 1, 4)]
    first, rows = groups.part(0, 1)
    assert (rows.start, rows.stop) == (0, 2) and first.ends.tolist() == [2]
