"""The operator on the host, as compiled models run it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from flix import ConfigError  # noqa: E402
from flix.backends.torch import adapt  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import live_pairs, randomize, routing  # noqa: E402


def _compiled(strategy="auto"):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = adapt(torch.nn.Sequential(torch.nn.Linear(6, 5)), config(), strategy=strategy)
    randomize(model)
    return model, torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_compiled_models_do_not_touch_absent_features(strategy):
    model, compiled = _compiled(strategy)
    ids, weights = routing([{"language": "hau", "task": "pos"}, {"task": "pos"}])
    with torch.no_grad():
        for name, parameter in live_pairs(model).items():
            if not name.endswith((".hau", ".pos")):
                parameter.fill_(float("nan"))
    x = torch.randn(2, 9, 6)
    y = compiled(x, flix_features=ids, flix_weights=weights)
    assert_close(y, model(x, flix_features=ids, flix_weights=weights), dtype="float32")
    y.sum().backward()
    for name, parameter in live_pairs(model).items():
        assert parameter.grad.isfinite().all()
        assert bool(parameter.grad.any()) == name.endswith((".hau", ".pos")), name


def test_single_in_a_compiled_model_refuses_rows_that_differ():
    _, compiled = _compiled("single")
    with pytest.raises(ConfigError, match="row 1 differs from row 0"):
        compiled(torch.zeros(2, 3, 6), flix_features=torch.tensor([[0], [5]]))
