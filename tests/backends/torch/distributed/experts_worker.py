"""One process of several that train a mixture of experts; started by test_experts.py.

python -m tests.backends.torch.distributed.experts_worker
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flix.backends.torch import adapt, named_pairs, shard_features, trainable_parameters
from flix.backends.torch.distributed import reduce_features
from tests.helpers.registry import ROWS, config
from tests.helpers.tolerance import assert_close
from tests.helpers.torch import routing

STEPS = (ROWS, ROWS[::-1], [{"language": "swa"}] * 2 + [{"task": "ner"}] * 2)


def made() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    settings = Qwen3MoeConfig(
        vocab_size=23, hidden_size=8, intermediate_size=12, moe_intermediate_size=6, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = adapt(Qwen3MoeForCausalLM(settings).double(), config()).train()
    assert any(shape.experts for shape in model.flix_bank.layout.shapes)
    with torch.no_grad():
        for parameter in model.flix_bank.parameters():
            parameter.normal_(std=0.2)
    return model


def runner(kind: str, model: Any, mesh: Any) -> Any:
    if kind == "reduced":
        reduce_features(model)
        return model
    if kind == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    features: set[Any] = set()
    if kind == "sharded":
        shard_features(model, mesh)
        features = set(model.flix_bank.parameters())
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=features)
    return model


def step(model: Any, optimizer: Any, rows: Any, part: slice) -> None:
    optimizer.zero_grad()
    ids, weights = routing(rows)
    tokens = torch.arange(len(rows) * 5).view(len(rows), 5) % 23
    logits = model(tokens[part], flix_features=ids[part], flix_weights=weights[part]).logits
    logits.square().mean().backward()
    optimizer.step()


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh, share = init_device_mesh("cpu", (world,)), len(ROWS) // world
    part = slice(share * rank, share * (rank + 1))
    for kind in ("reduced", "sharded", "fsdp", "ddp"):
        model, reference = made(), made()
        start = copy.deepcopy(named_pairs(model))
        run = runner(kind, model, mesh)
        optimizer, plain = (
            torch.optim.AdamW(trainable_parameters(m), lr=0.02, weight_decay=0.5)
            for m in (model, reference)
        )
        for rows in STEPS:
            step(run, optimizer, rows, part)
            step(reference, plain, rows, slice(0, len(ROWS)))
        found, moved = named_pairs(model), 0
        for name, wanted in named_pairs(reference).items():
            value = torch.from_numpy(found[name])
            assert_close(value, torch.from_numpy(wanted), name=f"{kind} {name}", times=100)
            if name.endswith(".zul"):
                assert (found[name] == start[name]).all(), f"{kind}: {name} is absent, but moved"
            moved += not (found[name] == start[name]).all()
        assert moved > 10
        print("same as one process:", kind)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
