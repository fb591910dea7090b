"""One process of a two-process run; started by test_agreement.py.

python distributed_worker.py {ddp|fsdp}
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist

from flix.backends.torch import adapt
from tests.helpers.registry import ROWS, config
from tests.helpers.tolerance import assert_close
from tests.helpers.torch import batch, live_pairs, make, output, randomize, routing


def main(kind: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    model = adapt(make("llama", torch.float32), config()).train()
    randomize(model)
    reference = copy.deepcopy(model)
    start = {n: p.detach().clone() for n, p in live_pairs(model).items()}
    if kind == "ddp":
        runner = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        runner = model

    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
        for m in (model, reference)
    ]
    inputs = batch("llama")
    # The processes activate different features; "yor" has rank 0 and "zul" acts nowhere.
    for rows in (ROWS, ROWS[::-1], [{"language": "swa"}] * 2 + [{"task": "ner"}] * 2):
        ids, weights = routing(rows)
        for m, optimizer, part in (
            (runner, optimizers[0], slice(2 * rank, 2 * rank + 2)),
            (reference, optimizers[1], slice(0, 4)),
        ):
            optimizer.zero_grad()
            some = {name: value[part] for name, value in inputs.items()}
            result = output(m(**some, flix_features=ids[part], flix_weights=weights[part]))
            result.square().mean().backward()
            optimizer.step()

    own = live_pairs(model)
    for name, expected in live_pairs(reference).items():
        found = own[name].detach()
        if hasattr(found, "full_tensor"):
            found = found.full_tensor()
        assert_close(found, expected, name=name, times=10)
        if name.endswith(".zul"):
            assert torch.equal(found, start[name]), f"{name} is absent everywhere, but moved"
        else:
            assert not torch.equal(found, start[name]), f"{name} did not train"
    dist.barrier()
    dist.destroy_process_group()
    print("same as one process")


if __name__ == "__main__":
    main(sys.argv[1])
