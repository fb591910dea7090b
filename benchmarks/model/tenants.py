"""Sixteen tenants, one LoRA each: flix's mixed batch beside PEFT, one tenant after the other and by its loop.

T5-small- and GPT-2-small-sized models with random weights. Every tenant has rows, an AdamW and a step of its own in
each round. PEFT trains them one after the other, with one adapter in the model, or in a loop over sixteen adapters
(``set_adapter``); each tenant's rows are split off before the clock starts. Under equal weights all must give equal
losses and gradients, tenant by tenant.

    python -m benchmarks.model.tenants [--smoke]
    python -m benchmarks.model.tenants --alone     # in float64: does each end where it ends alone?
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from copy import deepcopy
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flix
from benchmarks.common import (
    Arm,
    Bar,
    Result,
    Table,
    environment,
    interleave,
    over,
)
from benchmarks.guards import check_values
from benchmarks.layer.problem import RANK
from benchmarks.memory import peak_bytes
from benchmarks.model import torch_models as models
from benchmarks.model.problem import randomized
from benchmarks.model.torch_generation import tolerance
from benchmarks.torch_gradients import adapted_layers, model_pairs, pair_gradients
from flix.backends.torch import Tenants, adapt, load_into, to_adapter

PACKAGES = ("torch", "transformers", "peft", "numpy")
NAMES = {"t5": "T5-small", "gpt2": "GPT-2-small"}
TENANTS = 16
SHAPES = ((4, 64), (1, 16))
"""Rows of a tenant, and their tokens."""
FLIX, ONE, LOOP = (
    "**flix**, mixed batches",
    "PEFT, one tenant after the other",
    "PEFT, loop over adapters",
)
TOKENS = 1024
"""How many flix takes at a time: with more, activations leave the caches and gain nothing."""
RATE = 1e-12
"""So small that values stay what they are, and every round computes the same."""
_adamw = functools.partial(torch.optim.AdamW, fused=True)


class Rows:
    """The rows of all tenants, shuffled.

    Attributes:
        names: the tenants.
        owners: whose each row is.
        routing: the rows as flix routes them.
        inputs: what flix's model is called with.
        labels: of each token.
        parts: each tenant's own rows, with labels, as PEFT's model is called.
    """

    def __init__(self, which: str, model: nn.Module, tenants: int, rows: int, length: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.names = [f"t{i:02}" for i in range(tenants)]
        order = torch.randperm(tenants * rows, generator=generator).tolist()
        self.owners = [self.names[i // rows] for i in order]
        registry = flix.FeatureRegistry({"tenant": self.names})
        self.config = flix.FlixConfig(registry=registry, ranks=RANK)
        self.routing = registry.encode([{"tenant": owner} for owner in self.owners])
        shape, vocabulary = (len(order), length), model.config.vocab_size
        source, target = (torch.randint(2, vocabulary, shape, generator=generator) for _ in "ab")
        seq2seq = which == "t5"
        whole = {"input_ids": source, "labels": target if seq2seq else source}
        self.inputs, self.shift = {"input_ids": source}, not seq2seq
        self.labels = whole["labels"]
        if seq2seq:
            self.inputs["decoder_input_ids"] = F.pad(target, (1, 0))[:, :-1]
        self.parts = {}
        for name in self.names:
            mine = [i for i, owner in enumerate(self.owners) if owner == name]
            self.parts[name] = {key: value[mine] for key, value in whole.items()}

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every label, and whether it counts, both ``[batch, length]``."""
        if self.shift:  # the labels, as transformers does: logits are many times larger
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        found = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return found.view(labels.shape), labels != -100


def _between(losses: tuple[Tensor, Tensor], routing: Any) -> tuple[Tensor, Any, Tensor]:
    return losses[0], routing, losses[1]


def _flix_arm(make: models.Make, rows: Rows) -> tuple[Arm, Any]:
    model = adapt(make(), rows.config)
    load_into(model, randomized(to_adapter(model))).train()
    tenants = Tenants(model, "tenant", _adamw, lr=RATE)

    def losses() -> dict[str, Tensor]:
        """Forward and backward for all rows, in parts."""
        means: dict[str, Tensor] = {}
        for part in tenants.parts(rows.routing, max(1, TOKENS // rows.labels.shape[1])):
            routing, labels = rows.routing[part], rows.labels[part]
            inputs = {key: value[part] for key, value in rows.inputs.items()}
            logits = model(**inputs, flix_features=routing, use_cache=False).logits
            found = tenants.losses(*_between(rows.losses(logits, labels), routing))
            torch.stack(list(found.values())).sum().backward()
            means |= {name: value.detach() for name, value in found.items()}
        return means

    def run() -> dict[str, Tensor]:
        found = losses()
        tenants.step()
        return found

    def gradients() -> dict[str, Any]:
        found = losses()
        all_of_them = pair_gradients(model_pairs(model), model.parameters())
        tenants.zero_grad()
        return {
            **{f"loss {name}": value.numpy() for name, value in found.items()},
            **{name: g.copy() for name, g in all_of_them.items() if g is not None},
        }

    return Arm(FLIX, run, tenants.zero_grad), (model, gradients)


def _peft_model(make: models.Make, names: list[str]) -> Any:
    from peft import get_peft_model

    base = make()
    settings = models._config(RANK, task_type=models.task_type(base))
    model = get_peft_model(base, settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    return model.train()


def _copied(flix_model: nn.Module, model: Any, tenant: str, name: str) -> None:
    """Give an adapter a tenant's values."""
    with torch.no_grad():
        for path, layer in adapted_layers(flix_model):
            twin = model.base_model.model.get_submodule(path)
            twin.lora_A[name].weight.copy_(layer.flix_A["tenant", tenant])
            twin.lora_B[name].weight.copy_(layer.flix_B["tenant", tenant])


def _peft_arm(
    make: models.Make, rows: Rows, flix_model: nn.Module, several: bool
) -> tuple[Arm, Callable[[], dict[str, Any]]]:
    names = rows.names if several else ["one"]
    model = _peft_model(make, names)
    parameters = {
        name: [p for n, p in model.named_parameters() if f".{name}." in n] for name in names
    }
    for name in names:
        for parameter in parameters[name]:
            parameter.requires_grad_(True)
    optimizers = {name: _adamw(parameters[name], lr=RATE) for name in names}
    paths = [path for path, _ in adapted_layers(flix_model)]

    def step(tenant: str) -> Tensor:
        name = tenant if several else "one"
        if several:
            model.base_model.set_adapter(name)
        loss = model(**rows.parts[tenant], use_cache=False).loss
        loss.backward()
        optimizers[name].step()
        return loss.detach()

    def run() -> dict[str, Tensor]:
        found = {}
        for tenant in rows.names:
            found[tenant] = step(tenant)
            optimizers[tenant if several else "one"].zero_grad()
        return found

    def gradients() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for tenant in rows.names:
            name = tenant if several else "one"
            _copied(flix_model, model, tenant, name)
            found[f"loss {tenant}"] = step(tenant).numpy()
            for path in paths:
                layer = model.base_model.model.get_submodule(path)
                for part, side in (("A", layer.lora_A), ("B", layer.lora_B)):
                    gradient = side[name].weight.grad
                    found[f"{path}.{part}.tenant.{tenant}"] = gradient.numpy().copy()
            optimizers[name].zero_grad()
        return found

    return Arm(LOOP if several else ONE, run), gradients


def arms_of(which: str, rows: int, length: int, smoke: bool) -> list[Arm]:
    """The candidates, under equal weights and guarded: losses and gradients of all tenants agree."""
    build = {"t5": models.t5_small, "gpt2": models.gpt2_small}[which]

    def make() -> nn.Module:
        return build(smoke).double() if smoke else build(smoke)

    base = make()
    batch = Rows(which, base, 3 if smoke else TENANTS, rows, length)
    arm, (model, gradients) = _flix_arm(make, batch)
    expected = gradients()
    wanted = 2 * len(batch.names) * sum(1 for _ in adapted_layers(model)) + len(batch.names)
    if len(expected) != wanted:
        raise AssertionError(f"flix gave {len(expected)} results, expected {wanted}")
    check_values(FLIX, expected, list(expected))
    found = [arm]
    for several in (False, True):
        peer, values = _peft_arm(make, batch, model, several)
        check_values(peer.name, values(), expected, tolerance(base))
        found.append(peer)
    return found


def ends_alone(which: str, smoke: bool = False, steps: int = 50) -> tuple[float, float]:
    """The largest difference, in float64, between what tenants end with together and each alone; and how far they went.

    Each has a row of eight tokens a step. Half of them go by AdamW with a cosine schedule and their own clipping, half
    by SGD with momentum, at learning rates of their own.
    """
    build = {"t5": models.t5_small, "gpt2": models.gpt2_small}[which]
    base = build(smoke).double()
    rows = Rows(which, base, 3 if smoke else TENANTS, 1, 8)
    rates = {name: 1e-3 * (1 + i) for i, name in enumerate(rows.names)}
    kinds = dict(zip(rows.names, cycle((_adamw, functools.partial(torch.optim.SGD, momentum=0.9)))))
    schedules = dict.fromkeys(rows.names[::2], _cosine)
    norms = dict.fromkeys(rows.names[::2], 1.0)

    def trained(names: list[str], values: dict[str, Tensor]) -> dict[str, Tensor]:
        registry = flix.FeatureRegistry({"tenant": names})
        model = adapt(deepcopy(base), flix.FlixConfig(registry=registry, ranks=RANK)).train()
        bank: Any = model.flix_bank
        with torch.no_grad():
            for name in names:
                parameter = bank.parameter(("tenant", name))
                parameter.copy_(values.get(name, 0.02 * torch.randn_like(parameter)))
                values.setdefault(name, parameter.detach().clone())
        mine = (
            {n: v for n, v in given.items() if n in names}
            for given in (kinds, rates, schedules, norms)
        )
        kind, lr, schedule, max_norm = mine
        tenants = Tenants(model, "tenant", kind, lr=lr, schedule=schedule, max_norm=max_norm)
        some = [i for i, owner in enumerate(rows.owners) if owner in names]
        routing = registry.encode([{"tenant": rows.owners[i]} for i in some])
        inputs = {key: value[some] for key, value in rows.inputs.items()}
        for _ in range(steps):
            logits = model(**inputs, flix_features=routing, use_cache=False).logits
            losses = tenants.losses(*_between(rows.losses(logits, rows.labels[some]), routing))
            sum(losses.values()).backward()  # type: ignore[union-attr]
            tenants.step()
        return {name: bank.parameter(("tenant", name)).detach() for name in names}

    start: dict[str, Tensor] = {}
    together = trained(rows.names, start)
    apart = [trained([name], start)[name] for name in rows.names]
    pairs = list(zip(together.items(), apart, strict=True))
    moved = min(float((value - start[name]).abs().max()) for (name, value), _ in pairs)
    return max(float((value - other).abs().max()) for (_, value), other in pairs), moved


def _cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)


def _suite(which: str, smoke: bool) -> Result:
    torch.set_num_threads(1)
    name = NAMES[which]
    result = Result(
        f"tenants-{which}",
        f"{TENANTS} tenants in one run: {name}-sized, PyTorch",
        environment=environment(PACKAGES),
    )
    table = []
    for (rows, length), bar in zip(((1, 6), (1, 4)) if smoke else SHAPES, (1.2, 2.0), strict=True):
        arms = arms_of(which, rows, length, smoke)
        times = interleave(arms, 1 if smoke else 8, 0 if smoke else 1, 5.0 if smoke else 150.0)
        ratios = over(times, FLIX)
        for arm in arms:
            tokens = rows * length * (3 if smoke else TENANTS) / np.asarray(times[arm.name])
            peak = peak_bytes(arm.run, arm.reset) / 2**20
            cells = [float(np.median(times[arm.name])), float(np.median(tokens)), ratios[arm.name]]
            table.append([f"{rows} x {length}: {arm.name}", *cells, peak])
        better = min(ratios[ONE], ratios[LOOP], key=lambda figure: figure.median)
        what = f"{name}, {rows} {'row' if rows == 1 else 'rows'} of {length} tokens a tenant"
        result.bars.append(
            Bar(f"{what}: the better of PEFT's over flix", better, bar, at_most=False)
        )
    result.tables.append(
        Table(
            f"A step of each of {TENANTS} tenants, {name}-sized",
            ["rows x tokens of a tenant", "s", "tokens a second", "time over flix", "peak MiB"],
            table,
            "Forward, backward and a fused AdamW for each tenant. Peak: what torch's allocator held at once, above model "
            "and optimizer.",
        )
    )
    result.method = (
        f"Random weights, all linear layers but the head adapted, rank {RANK}; every tenant has its own rows, loss and AdamW. "
        "Losses and gradients of all tenants were equal before the clock started."
    )
    return result


def t5(smoke: bool = False) -> Result:
    """The T5-small-sized model's part of the benchmark."""
    return _suite("t5", smoke)


def gpt2(smoke: bool = False) -> Result:
    """The GPT-2-small-sized model's part of the benchmark."""
    return _suite("gpt2", smoke)


if __name__ == "__main__":
    from benchmarks.report import section

    if "--alone" in sys.argv:
        for which in NAMES:
            difference, moved = ends_alone(which, "--smoke" in sys.argv)
            print(
                f"{NAMES[which]}: differs by {difference:.1e} at most, after moving by {moved:.1e} at least"
            )
            assert difference < 1e-9 < moved
        raise SystemExit
    for part in (t5, gpt2):
        print(section(part("--smoke" in sys.argv).to_dict()), "\n")
