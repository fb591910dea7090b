"""Ray Train runs the loop: two workers, features sharded over them, checkpoints, restarts. Made-up data; ray[train]."""

import sys
from pathlib import Path

import ray
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import flix
from flix.backends.torch import adapt, distributed, save, trainable_parameters

REGISTRY = flix.FeatureRegistry({"language": [f"l{i}" for i in range(4)]})


def loop(settings):  # what each worker runs; Ray has made the process group
    folder, rank = settings["folder"], dist.get_rank()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 64))
    model = adapt(base, flix.FlixConfig(registry=REGISTRY, ranks=2))
    distributed.shard_features(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.02)
    done, _ = distributed.load_checkpoint(
        f"{folder}/steps", model, optimizer
    )  # where a worker died before
    for step in range(done, settings["steps"]):
        draw = torch.Generator().manual_seed(1000 * step + rank)  # a worker's rows are its own
        tokens, ids = (torch.randint(n, (4, n // 4), generator=draw) for n in (64, 4))
        logits = model(tokens[:, :-1], flix_features=ids)
        loss = nn.functional.cross_entropy(logits.mT, tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 3 == 0:
            distributed.save_checkpoint(f"{folder}/steps", model, optimizer, step + 1, keep=2)
            ray.train.report({"loss": loss.item(), "step": step + 1})
    save(model, f"{folder}/adapter")  # the first worker writes


def main(folder="ray", steps=9, run=loop):
    place = Path(folder).absolute()  # on several machines: a folder that all of them see
    trainer = TorchTrainer(
        run,
        train_loop_config={"folder": str(place), "steps": steps},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(place / "runs"), failure_config=FailureConfig(2)),
    )
    trainer.fit()
    last = distributed.last_checkpoint(place / "steps")
    print(f"two workers trained; the last checkpoint: {last.name}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
