"""One process of several that write and read checkpoints together; started by test_checkpoints.py.

python -m tests.backends.torch.distributed.checkpoint_worker FOLDER {save|load}
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flix.backends.torch import adapt, freeze, trainable_parameters
from flix.backends.torch.distributed import load_checkpoint, save_checkpoint, shard_features
from flix.backends.torch.heads import trained_heads
from flix.backends.torch.parameters import whole
from tests.backends.torch.distributed.faults import example

EXTRA = {"schedule": [1, 2.5, None], "best": "step 2"}


def made(mesh: Any = None, lr: float = 0.02) -> tuple[Any, Any]:
    """A model with a norm that trains and a feature that does not, and its optimizer."""
    loop = example()
    torch.manual_seed(0)
    model = adapt(loop.base(), loop.flix.FlixConfig(registry=loop.REGISTRY, ranks=2, lora_dropout=0.1))  # fmt: skip
    model[1][0].requires_grad_(True)
    freeze(model, {"language": "l3"})
    if mesh is not None:
        shard_features(model, mesh)
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=set(model.flix_bank.parameters()))
    return model, torch.optim.AdamW(trainable_parameters(model), lr=lr, weight_decay=0.1)


def train(model: Any, optimizer: Any, steps: Any, rank: int = 0) -> None:
    for step in steps:
        tokens, labels, ids = example().batch_of(step, rank)
        logits = model(tokens, flix_features=ids)
        torch.nn.functional.cross_entropy(logits.mT, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def held(model: Any, optimizer: Any) -> dict[str, Any]:
    """All values and all of the optimizer's state, whole."""
    bank = model.flix_bank
    named = {**{bank.keys[i]: p for i, p in bank.held().items()}, **trained_heads(model)}
    found = {name: whole(p.detach()) for name, p in named.items()}
    for name, parameter in named.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {entry}"] = whole(value)
    return found


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def main(folder: Path, what: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    if what == "save":
        model, optimizer = made(mesh)
        train(model, optimizer, range(3), rank)
        save_checkpoint(folder / "steps", model, optimizer, 3, EXTRA)
        there = held(model, optimizer)
        if rank == 0:
            torch.save(there, folder / "there.pt")
        train(model, optimizer, range(3, 5), rank)
        after = held(model, optimizer)
    model, optimizer = made(mesh, lr=1.0)
    torch.manual_seed(7)
    assert load_checkpoint(folder / "steps", model, optimizer) == (3, EXTRA)
    check(held(model, optimizer), torch.load(folder / "there.pt"))
    assert [group["lr"] for group in optimizer.param_groups] == [0.02]
    if what == "save":  # with its random numbers, too: there is dropout
        train(model, optimizer, range(3, 5), rank)
        check(held(model, optimizer), after)
    dist.barrier()
    dist.destroy_process_group()
    print("as it was")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
