"""The peak is of what is live at once."""

import pytest

torch = pytest.importorskip("torch")

from benchmarks.memory import peak_bytes  # noqa: E402


def test_peak_memory_counts_what_is_live_at_once():
    size = 4 * 100_000

    def run():
        a = torch.ones(100_000)
        b = a + 1
        del a
        return b * 2  # two live at once, three made

    run()
    assert 2 * size <= peak_bytes(run) < 2.2 * size
