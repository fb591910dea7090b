"""Ids placed on a bank inside compiled graphs."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from flix.backends.torch import adapt  # noqa: E402
from flix.backends.torch.kernels.routes import group, routes  # noqa: E402
from tests.helpers.kernels import INTERPRETED  # noqa: E402
from tests.helpers.registry import config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def test_opcheck_and_values_of_routes():
    ids = torch.tensor([[2, -1, 0], [0, 0, 1]], device=DEVICE, dtype=torch.int32)
    arguments = (ids, (2, 0, 1), (1.0, 3.0, 0.5), False, True)
    torch.library.opcheck(routes, arguments)
    rows, slots, factor, order, starts = (t.tolist() for t in routes(*arguments))
    assert rows == [[2, 0, 1, -1, -1, -1], [0, 1, 0, 1, -1, -1]]
    assert [row[:3] for row in slots] == [[0, 2, 2], [0, 0, 1]]
    assert factor == [[0.5, 1.0, 1.0, 0, 0, 0], [1.0, 1.0, 1.0, 1.0, 0, 0]]
    assert [order[starts[u] : starts[u + 1]] for u in range(3)] == [[1, 6, 8], [2, 7, 9], [0]]
    assert [t.tolist() for t in group(routes(*arguments)[0], 3)] == [order, starts]


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_ids_of_no_feature_give_nan_in_compiled_models(kind):
    torch._dynamo.reset()
    layer = torch.nn.Linear(6, 5) if kind == "linear" else torch.nn.Embedding(6, 5)
    model = adapt(torch.nn.Sequential(layer), config(target_modules=["0"]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 6) if kind == "linear" else torch.ones(3, 4, dtype=torch.int64)
    for bad in (6, 9, -2):
        y = compiled(x, flix_features=torch.tensor([[0, 1], [0, bad], [-1, -1]]))
        assert y.isnan().flatten(1).all(1).tolist() == [False, True, False]
        assert y[[0, 2]].isfinite().all()
