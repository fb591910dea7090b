"""Several processes: what is counted, and what follows by arithmetic."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks.scale import processes  # noqa: E402

SIZES = processes.Sizes(layers=2, d=8, rank=2, rows=10, length=2)
CASE = processes.Case(30, 2, SIZES, 3)


def test_twenty_features_act_in_each_process_and_in_all():
    for ranks in ([0], [1], [0, 1]):
        x, ids = processes.batch(CASE, 5, ranks)
        assert len(x) == len(ids) == 10 * len(ranks)
        assert len(np.unique(ids.numpy())) == processes.ACTIVE
    whole, half = processes.batch(CASE, 5, [0, 1]), processes.batch(CASE, 5, [1])
    assert all(torch.equal(a[10:], b) for a, b in zip(whole, half, strict=True))


def test_sizes_follow_from_a_base():
    lines = processes.sizes_table().splitlines()[2:]
    # Llama-7B's linear layers: 32 blocks of 4 x (4096 + 4096) and 3 x (4096 + 11008), rank 4, 4 bytes, 1,000 features.
    assert f"{1_000 * 4 * 4 * 32 * (4 * 8192 + 3 * 15104) / 1e9:,.1f} GB" in lines[0]
    assert [line.split("|")[4].strip() for line in lines] == ["40", "320", "40", "320"]
    assert lines[0].endswith("4.0% |") and lines[1].endswith("32.0% |")


@pytest.mark.slow
def test_a_run_counts_what_torch_is_handed():
    first, second = processes.run(CASE)
    told, each = 1024, 2 * 2 * (8 + 8) * 4  # rank 2, two layers of 8 + 8, four bytes
    assert first["steps"] == second["steps"] == [[2, told + 20 * each]] * 3
    assert first["parameters"] == 30 * each and first["feature"] == each
    assert all(abs(two - one) < 1e-5 for two, one in first["losses"])
