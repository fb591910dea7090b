"""A loop as TorchTitan's: base and features sharded over processes, checkpoints, resuming. Made-up data; to start it:

torchrun --nproc-per-node 2 --max-restarts 3 examples/sharded_loop.py
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import flix
from flix.backends.torch import adapt, save, trainable_parameters
from flix.backends.torch.distributed import load_checkpoint, save_checkpoint, shard_features

REGISTRY = flix.FeatureRegistry({"language": [f"l{i}" for i in range(40)]})


def base(d=32):
    blocks = [nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU()) for _ in range(2)]
    return nn.Sequential(nn.Embedding(64, d), *blocks, nn.Linear(d, 64))


def batch_of(step, rank):
    draw = torch.Generator().manual_seed(1000 * step + rank)  # a process's rows are its own
    tokens = torch.randint(64, (4, 9), generator=draw)
    return tokens[:, :-1], tokens[:, 1:], torch.randint(40, (4, 1), generator=draw)


def main(folder="sharded", steps=12):
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = adapt(base(), flix.FlixConfig(registry=REGISTRY, ranks=2, lora_dropout=0.1))
    shard_features(model, mesh)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(model.flix_bank.parameters()))
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.02, weight_decay=0.1)
    done, _ = load_checkpoint(f"{folder}/steps", model, optimizer)  # 0 at the first start
    for step in range(done, steps):
        tokens, labels, ids = batch_of(step, rank)
        logits = model(tokens, flix_features=ids)
        nn.functional.cross_entropy(logits.mT, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 3 == 0:
            save_checkpoint(f"{folder}/steps", model, optimizer, step + 1, keep=2)
    save(model, f"{folder}/adapter")  # the first process writes
    if rank == 0:
        print(f"steps {done} to {steps}; the last: {model.flix_bank.sharding.last}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:2])
