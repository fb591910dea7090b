"""A model of two processes, and one that gets whole batches, which they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flix.backends.torch import adapt
from flix.core.errors import ConfigError
from tests.helpers.registry import config

D = 6
ROWS: list[Any] = [
    {"language": "hau", "task": "ner"},
    {"language": {"swa": 0.5, "hau": -1.5}},
    {"task": ["ner", "pos"]},
    {"language": "swa", "task": "pos"},
]
"""Two of each process. "yor" has rank 0, and "zul" acts nowhere."""

NONE: list[Any] = [{}, {}]


class Net(nn.Module):
    """Three linear layers and a head, with checkpoints around the inner ones if they are asked for."""

    def __init__(self, checkpoints: str = "") -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(D, D) for _ in range(4))
        self.checkpoints = checkpoints
        self.hidden: Any = None

    def forward(self, x: Any) -> Any:
        x = torch.tanh(self.a(x))
        for layer in (self.b, self.c):
            if self.checkpoints:
                x = x + checkpoint(layer, x, use_reentrant=self.checkpoints == "reentrant")
            else:
                x = x + torch.tanh(layer(x))
        self.hidden = x
        return {"out": [self.head(x)]}


def made(heads: bool = False, seed: int = 0, checkpoints: str = "", **changes: Any) -> Any:
    """An adapted model with values that are zero nowhere."""
    torch.manual_seed(seed)
    net = Net(checkpoints).double()
    settings = {"target_modules": ["a", "b", "c"], **changes}
    model = adapt(net, config(**settings)).train()
    with torch.no_grad():
        for parameter in model.flix_bank.parameters():
            parameter.normal_(std=0.3)
    if heads:
        model.head.requires_grad_(True)
    return model


def optimizer_of(model: Any) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)


def inputs(rows: int = 4) -> Any:
    return torch.randn(rows, 3, D, generator=torch.Generator().manual_seed(7)).double()


def loss_of(model: Any, x: Any, rows: Sequence[Any]) -> Any:
    encoded = (
        model.module if isinstance(model, DistributedDataParallel) else model
    ).flix_config.registry.encode(rows)
    return model(x, flix_features=encoded)["out"][0].square().mean()


def own(rows: Sequence[Any]) -> slice:
    """This process's part of some rows."""
    half = len(rows) // 2
    return slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)


def values(model: Any) -> dict[str, Any]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "flix_bank" in n or "head" in n}  # fmt: skip


def assert_same(one: Any, two: Any, tolerance: float = 1e-12) -> None:
    found, wanted = values(one), values(two)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def assert_bits_everywhere(model: Any) -> None:
    """All processes hold the same values, bit for bit."""
    flat = torch.cat([v.reshape(-1) for v in values(model).values()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    assert all(torch.equal(found[0], other) for other in found)


def step(model: Any, optimizer: Any, x: Any, rows: Sequence[Any], clip: float = 0.05) -> float:
    loss = loss_of(model, x, rows)
    loss.backward()
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


BATCHES = (ROWS, ROWS[::-1], [*ROWS[:2], *NONE], [*NONE, *ROWS[:2]], [*NONE, *NONE], ROWS)


def follow(model: Any, reference: Any, run: Any = None, batches: Any = BATCHES) -> None:
    """Train both, one in two processes and one on whole batches, and hold them to each other, step by step."""
    optimizers = optimizer_of(model), optimizer_of(reference)
    before, x = values(model), inputs()
    for rows in batches:
        part = own(rows)
        norm = step(run or model, optimizers[0], x[part], rows[part])
        wanted = step(reference, optimizers[1], x, rows)
        assert abs(norm - wanted) <= 1e-12, "clipped before it was reduced"
    assert_same(model, reference)
    assert_bits_everywhere(model)
    for name, value in values(model).items():
        still = name.endswith(":zul") or (not model.head.weight.requires_grad and "head" in name)
        assert torch.equal(before[name], value) == still, name


def raised(call: Callable[[], Any], *words: str) -> None:
    """The call raises a ConfigError with these words, in every process."""
    try:
        call()
    except ConfigError as error:
        text = str(error)
    else:
        text = ""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, text)
    for rank, said in enumerate(found):
        assert said, f"nothing was raised in rank {rank}"
        for word in words:
            assert word in said, f"{word!r} is not in {said!r}"
