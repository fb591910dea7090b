"""One process of a two-process run under transformers' tensor parallelism; started by test_agreement.py.

python tensor_parallel_worker.py {tp|hooks}
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flix import ConfigError, TargetError
from flix.backends.torch import adapt, disable, load, merge, merge_in_place, save
from flix.backends.torch.adapt import unadapt
from flix.backends.torch.layer import flix_layers
from flix.backends.torch.sharded import FlixSharded
from tests.helpers.registry import ROWS, config
from tests.helpers.tolerance import assert_close
from tests.helpers.torch import (
    batch,
    live_pairs,
    llama,
    make,
    output,
    parameters_of,
    randomize,
    routing,
)


def split(model: Any, mesh: Any) -> Any:
    """As ``from_pretrained(..., tp_plan="auto")`` leaves a model, by its own plan."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = {}
    for name, _ in model.named_modules():
        part = name.rpartition(".")[2]
        if style := {"o_proj": "rowwise", "down_proj": "rowwise"}.get(
            part, "colwise" if part.endswith("_proj") else ""
        ):
            plan |= {name: style, f"{name}.weight": style}
    assert plan
    return apply_tensor_parallelism(model, mesh, plan)


def refused(error: type[Exception], text: str, call: Any) -> None:
    try:
        call()
    except error as found:
        assert text in str(found), found
    else:
        raise AssertionError(f"{text}: nothing was refused")


def tensor_parallel(mesh: Any) -> None:
    plain = llama(num_key_value_heads=2).eval()
    reference = adapt(copy.deepcopy(plain), config())
    randomize(reference)
    model = adapt(split(copy.deepcopy(plain), mesh), config())
    randomize(model)
    layers = dict(flix_layers(model))
    assert layers and all(isinstance(layer, FlixSharded) for layer in layers.values())
    assert [type(v).__name__ for v in parameters_of(model).values()] == ["Parameter"] * 5
    inputs, (ids, weights) = batch("llama"), routing()
    for rows in (slice(0, 4), slice(1, 3)):
        some = {name: value[rows] for name, value in inputs.items()}
        given = {"flix_features": ids[rows], "flix_weights": weights[rows]}
        with torch.no_grad():
            for m in (model, reference):
                m.eval()
            wanted = output(reference(**some, **given))
            assert_close(output(model(**some, **given)), wanted, times=10)
            with disable(model), disable(reference):
                assert_close(output(model(**some)), output(reference(**some)), times=10)
            base = output(reference(**some, flix_features=torch.full_like(ids[rows], -1)))
            assert not torch.allclose(base, wanted, atol=1e-3), "the features do nothing"
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01)
        for m in (model, reference)
    ]
    for rows in (ROWS, ROWS[::-1]):
        ids, weights = routing(rows)
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            m.train()
            scale = weights.clone().requires_grad_()
            loss = output(m(**inputs, flix_features=ids, flix_weights=scale)).square().mean()
            loss.backward()
            m.found = scale.grad
            optimizer.step()
        assert_close(model.found, reference.found, name="gradients of weights", times=20)
    own = live_pairs(model)
    for name, expected in live_pairs(reference).items():
        assert_close(own[name].detach(), expected.detach(), name=name, times=100)
    # Each process has the same features, to the last bit but for the order of sums.
    for value in parameters_of(model).values():
        other = value.detach().clone()
        dist.broadcast(other, 0)
        torch.testing.assert_close(value.detach(), other, rtol=1e-4, atol=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "a")
        again = load(copy.deepcopy(plain), Path(folder) / "a").eval()
        assert_close(
            output(again(**inputs, flix_features=ids)),
            output(model.eval()(**inputs, flix_features=ids)),
            times=50,
        )
        whole = load(split(copy.deepcopy(plain), mesh), Path(folder) / "a").eval()
        assert_close(
            output(whole(**inputs, flix_features=ids)),
            output(again(**inputs, flix_features=ids)),
            times=50,
        )
    refused(
        TargetError, "no process has its whole kernel", lambda: merge(model, {"language": "swa"})
    )
    refused(
        TargetError,
        "no process has its whole kernel",
        lambda: merge_in_place(model, {"language": "swa"}),
    )
    dropping = adapt(split(copy.deepcopy(plain), mesh), config(lora_dropout=0.5)).train()
    refused(ConfigError, "lora_dropout=0.5: layer", lambda: dropping(**inputs, flix_features=ids))
    unadapt(model)
    assert_close(output(model(**inputs)), output(plain(**inputs)), times=10)


def hooks(mesh: Any) -> None:
    """torch's own hooks hand layers tensors of another class; such layers are named."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = make("llama", torch.float32)
    for block in model.model.layers:
        styles = {
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        parallelize_module(block, mesh, styles)
    refused(
        TargetError,
        "spread over processes by hooks (parallelize_module)",
        lambda: adapt(model, config(target_modules=["gate_proj"])),
    )


def main(kind: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    {"tp": tensor_parallel, "hooks": hooks}[kind](init_device_mesh("cpu", (2,)))
    dist.barrier()
    dist.destroy_process_group()
    print("same as one process")


if __name__ == "__main__":
    main(sys.argv[1])
