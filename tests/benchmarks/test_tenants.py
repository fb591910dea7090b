"""What the benchmark of tenants measures is tenants that end where each ends alone."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.model.tenants import ends_alone


@pytest.mark.parametrize("which", ["t5", "gpt2"])
def test_each_ends_alone(which):
    difference, moved = ends_alone(which, smoke=True, steps=20)
    assert difference < 1e-9 < 1e-3 < moved
