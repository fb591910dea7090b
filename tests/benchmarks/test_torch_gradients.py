"""A pair's gradient is found wherever its parameter holds it."""

import pytest

torch = pytest.importorskip("torch")

from benchmarks.torch_gradients import pair_gradients  # noqa: E402


def test_pairs_that_are_parameters_and_pairs_within_one():
    alone, unused = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    flat = torch.nn.Parameter(torch.arange(12.0))
    a, b = flat[:6].view(2, 3), flat[6:].view(2, 3).t()
    ((alone * 2).sum() + (a * 3).sum() + (b * torch.arange(6.0).view(3, 2)).sum()).backward()
    pairs = {"alone": alone, "unused": unused, "a": a, "b": b}
    found = pair_gradients(pairs, [unused, flat, alone])
    assert found["unused"] is None
    assert found["alone"].tolist() == [[2.0] * 3] * 2
    assert found["a"].tolist() == [[3.0] * 3] * 2
    assert found["b"].tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def test_a_tensor_of_no_parameter_is_an_error():
    with pytest.raises(LookupError, match="stray lies in no parameter"):
        pair_gradients({"stray": torch.ones(2)}, [torch.nn.Parameter(torch.ones(2))])
