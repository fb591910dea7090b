"""One process of two under accelerate's FSDP2, by the Trainer's arguments and in a loop; started by test_fsdp.py.

accelerate shards on accelerators alone, and runs DDP on a CPU whatever it is told. Here its state is made FSDP:
from there on everything is its own way, over gloo.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, GradientState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

import flix
from flix.backends.torch import named_pairs, shard_features, trainable_parameters
from flix.backends.torch.parameters import whole
from flix.transformers import FlixCollator
from tests.helpers.transformers import classifier, dataset, rows, trainer

FSDP = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "BertLayer"}}  # fmt: skip

make_state = AcceleratorState.__init__


def as_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    make_state(self, *args, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def anew() -> None:
    for state in (AcceleratorState, GradientState):
        state._reset_state()


def values(model: Any) -> dict[str, Any]:
    heads = {n: whole(p.detach()).numpy() for n, p in model.named_parameters() if n.startswith("classifier")}  # fmt: skip
    return {**named_pairs(model), **{n: v.copy() for n, v in heads.items()}}


def near(found: Any, wanted: Any, what: str) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5, err_msg=f"{what} {name}")  # fmt: skip


def train(folder: Path, resume: Any = None, **changes: Any) -> Any:
    anew()
    made = trainer(
        folder, data=dataset(24), max_steps=6, save_steps=3, save_strategy="steps", eval_strategy="steps", eval_steps=2,
        eval_dataset=dataset(7), ddp_backend="gloo", optim="adamw_torch", max_grad_norm=0.5, **changes,
    )  # fmt: skip
    made.train(resume_from_checkpoint=resume)
    return made


def with_trainer(folder: Path) -> None:
    """The same as DDP, and resumed bit for bit."""
    plain = values(train(folder / "ddp").model)
    made = train(folder / "whole", **FSDP)
    model = made.model
    assert isinstance(model, FSDPModule) and model.flix_bank.sharding is not None
    assert any(isinstance(m, FSDPModule) for m in model.bert.encoder.layer)
    near(values(model), plain, "trainer")
    wanted = values(model)
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "device_mesh"), name
    made.save_model(folder / "adapter")
    assert (folder / "adapter" / "flix.safetensors").exists()
    again = train(folder / "whole", resume=str(folder / "whole" / "checkpoint-3"), **FSDP)
    for name, value in values(again.model).items():
        assert np.array_equal(value, wanted[name]), name
    anew()
    one = trainer(folder / "one", **FSDP)
    with pytest.raises(flix.ConfigError, match="cpu_ram_efficient_loading"):
        one.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = True
        one.check_fsdp()


def loop(kind: str) -> dict[str, Any]:
    """A loop of accelerate's, by the plugin's own arguments; "whole" is what one process finds."""
    anew()
    settings: dict[str, Any] = {"ignored_modules": "flix_bank"} if kind == "features" else {}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False, **settings,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=None if kind == "whole" else plugin)
    model = classifier(feature_dropout=None).train()
    model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if kind == "features":
        shard_features(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.01, weight_decay=0.1)
    if kind != "whole":
        model, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(model, FSDPModule)
    collate = FlixCollator(model.flix_config, seed=5)
    held = [{k: v for k, v in row.items() if k != "text"} for row in rows(24)]
    rank = accelerator.process_index
    for step in range(4):
        some = held[6 * step : 6 * step + 6]
        batch = collate(some if kind == "whole" else some[3 * rank : 3 * rank + 3])
        loss = model(**batch).loss
        accelerator.backward(loss)
        if kind != "whole":
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    AcceleratorState.__init__ = as_fsdp
    with_trainer(folder)
    wanted = loop("whole")
    near(loop("features"), wanted, "accelerate with sharded features")
    near(loop("plain"), wanted, "accelerate alone")
    dist.barrier()
    print("the same")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
