"""A pair's gradient is found wherever its parameter holds it."""

import pytest

torch = pytest.importorskip("torch")

import flix  # noqa: E402
from benchmarks.torch_gradients import (  # noqa: E402
    model_pairs,
    other_gradients,
    pair_gradients,
)
from flix.backends.torch import adapt  # noqa: E402


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
    assert other_gradients(pairs, [unused, flat, alone]) == 0
    assert other_gradients({"a": a}, [unused, flat, alone]) == 1


def test_a_tensor_of_no_parameter_is_an_error():
    with pytest.raises(LookupError, match="stray lies in no parameter"):
        pair_gradients({"stray": torch.ones(2)}, [torch.nn.Parameter(torch.ones(2))])


def test_the_pairs_of_a_model_are_what_it_computes_with():
    registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["ner"]})
    config = flix.FlixConfig(registry=registry, ranks={"language": {"hau": 2, "swa": 0}, "task": 1})
    model = adapt(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), config)
    pairs = model_pairs(model)
    names = [f"{i}.{s}.{f}" for i in "01" for s in "AB" for f in ("language.hau", "task.ner")]
    assert list(pairs) == names
    assert list(model_pairs(model, [("task", "ner")])) == [n for n in names if "task" in n]
    with torch.no_grad():
        pairs["1.B.language.hau"].fill_(1.0)
    x = torch.ones(1, 3)
    h = model[0](x, flix_features=[[-1]])
    y = model(x, flix_features=torch.tensor([[0, -1]]))
    expected = model[1](h, flix_features=[[-1]]) + pairs["1.A.language.hau"].sum(0) @ h[0]
    assert torch.allclose(y, expected)
