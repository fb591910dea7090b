"""Small mixtures of experts, adapted, and what they answer."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if int(transformers.__version__.partition(".")[0]) < 5:
    pytest.skip("transformers 5 keeps experts in tensors of three axes", allow_module_level=True)
from torch import nn  # noqa: E402

from flix.backends.torch import adapt, merge  # noqa: E402
from flix.backends.torch.experts import ExpertsKernel  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.torch import ROW, output, randomize  # noqa: E402
from tests.helpers.zoo import build, inputs_of  # noqa: E402

ONLY = r".*experts\.(gate_up|down)_proj"
COMPOSITIONS: list[Any] = [
    ROW,
    {"language": "hau", "task": "ner"},
    {"task": "pos"},
    {"language": "zul"},
]


def make(name: str = "qwen3-moe", dtype: Any = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(0)
    return build(name, **changes).to(dtype)


def adapted(
    name: str = "qwen3-moe",
    dtype: Any = torch.float64,
    build_with: dict[str, Any] | None = None,
    strategy: str = "auto",
    **changes: Any,
) -> Any:
    """A mixture, adapted with random values, in evaluation; ``build_with`` changes the mixture's own settings."""
    model = adapt(make(name, dtype, **(build_with or {})), config(**changes), strategy=strategy)
    randomize(model)
    return model.eval()


def answers(model: Any, name: str = "qwen3-moe", rows: Any = None, **inputs: Any) -> Any:
    """Each row under its own composition, in one batch."""
    rows = COMPOSITIONS if rows is None else rows
    encoded = model.flix_config.registry.encode(rows)
    with torch.no_grad():
        return output(model(**{**inputs_of(name, rows=len(rows)), **inputs}, flix_features=encoded))


def by_rows(model: Any, name: str = "qwen3-moe", rows: Any = None) -> Any:
    """The same in dense form: each row by a merged model of its own."""
    rows = COMPOSITIONS if rows is None else rows
    inputs = inputs_of(name, rows=len(rows))["input_ids"]
    with torch.no_grad():
        found = [merge(model, row)(input_ids=inputs[i : i + 1]) for i, row in enumerate(rows)]
    return torch.cat([output(one) for one in found])


def kernels(model: nn.Module) -> dict[str, ExpertsKernel]:
    """The adapted kernels of experts by path."""
    return {path: k for path, k in flix_layers(model) if isinstance(k, ExpertsKernel)}
