"""What stands around a model is looked at in one process, too: what cannot be right is refused, and nothing else."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.fsdp")  # once it is imported, forwards look for FSDP1

from flix.backends.torch.distributed import reduce_features  # noqa: E402
from flix.core.errors import ConfigError, TargetError  # noqa: E402
from tests.backends.torch.distributed.reducing_models import ROWS, inputs, loss_of, made  # noqa: E402


def test_parameters_that_are_tensors_for_one_call_are_no_fsdp1() -> None:
    model = made()
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    ids = model.flix_config.registry.encode(ROWS)
    found = torch.func.functional_call(model, values, (inputs(),), {"flix_features": ids})
    assert torch.equal(found["out"][0], model(inputs(), flix_features=ids)["out"][0])


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
def test_deepspeed_is_refused(mark: str, monkeypatch: Any) -> None:
    model = made()
    for parameter in model.parameters():
        setattr(parameter, mark, None)
    loss_of(model, inputs(), ROWS)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    with pytest.raises(ConfigError, match=r"ZeRO flattens .* reduce_features"):
        loss_of(model, inputs(), ROWS)


def test_a_reducer_needs_processes_and_an_adapted_model() -> None:
    with pytest.raises(TargetError, match="reduce_features"):
        reduce_features(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="torchrun"):
        reduce_features(made())
    assert not hasattr(made(), "no_sync")
