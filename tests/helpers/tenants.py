"""Tenants of tiny models that train together, and each alone, for tests."""

from __future__ import annotations

import functools
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import flix  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    Tenants,
    adapt,
)
from tests.helpers.torch import make, parameters_of  # noqa: E402

NAMES = ["ann", "ben", "cyd", "dan", "eve"]
RANKS = {"tenant": {"ann": 1, "ben": 3, "cyd": 2, "dan": 2, "eve": 2, "fay": 2}, "base": {"all": 2}}
STEPS = 50


class Lion(torch.optim.Optimizer):
    """Steps by signs, as users write their own."""

    def __init__(self, params, lr, beta=0.95, decay=0.1):
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["decay"])
                p.sub_(group["lr"] * mean.lerp(p.grad, 0.1).sign())
                mean.lerp_(p.grad, 1 - group["beta"])


OPTIMIZERS = {
    "ann": functools.partial(torch.optim.AdamW, fused=True, weight_decay=0.1),
    "ben": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
    "cyd": Lion,
    "dan": torch.optim.Adafactor,
    "eve": functools.partial(torch.optim.NAdam, foreach=True),
    "fay": functools.partial(torch.optim.AdamW, amsgrad=True),
}

RATES = {"ann": 3e-3, "ben": 5e-2, "cyd": 1e-3, "dan": 1e-2, "eve": 2e-3, "fay": 1e-3}
SCHEDULES = {
    "ann": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: min(1.0, (n + 1) / 9)),
    "ben": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
    "eve": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 5e-3, total_steps=60),
}

LIMITS = {"cyd": 20}
NORMS = {"ann": 0.05, "dan": 0.5, "eve": 0.1}


def config(names, **changes):
    groups = {"tenant": list(names), "base": ["all"]}
    ranks = {"tenant": {n: RANKS["tenant"].get(n, 2) for n in names}, "base": {"all": 2}}
    registry = flix.FeatureRegistry(groups, implies={("tenant", "*"): [("base", "all")]})
    return flix.FlixConfig(registry=registry, ranks=ranks, alpha=4.0, **changes)


def model(name="gpt2", names=NAMES, **changes):
    """A model with updates that are not zero, whose tenants share a frozen feature."""
    made = adapt(make(name), config(names, **changes))
    for (group, feature), parameter in parameters_of(made).items():
        generator = torch.Generator().manual_seed(sum(map(ord, group + feature)))
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.copy_(0.05 * noise)
        parameter.requires_grad_(group == "tenant")
    return made


def batches(steps=STEPS, names=NAMES, seed=0):
    """Shuffled rows of some tenants, one to three of each, some of their labels left out."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(steps):
        draw = torch.randint(0, 4, (len(names),), generator=generator).tolist()
        owners = [n for n, count in zip(names, draw, strict=True) for _ in range(count)]
        owners = owners or [names[step % len(names)]]
        owners = [owners[i] for i in torch.randperm(len(owners), generator=generator)]
        tokens = torch.randint(1, 40, (len(owners), 7), generator=generator)
        labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.2, -100)
        labels[:, -1] = tokens[:, -1]
        found.append((owners, tokens, labels))
    return found


def tokens_of(made, owners, tokens, labels):
    """The loss of each label before any mean, and which count."""
    routing = made.flix_config.registry.encode([{"tenant": owner} for owner in owners])
    inputs = {"input_ids": tokens}
    if made.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(1)
    logits = made(**inputs, flix_features=routing).logits
    found = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    return found, routing, labels != -100


def train(tenants, rows, seen=None, parts=None):
    for batch in rows:
        if parts is not None:
            train_in_parts(tenants, batch, parts)
            continue
        losses, routing, counts = tokens_of(tenants.model, *batch)
        means = tenants.losses(losses, routing, counts)
        total = sum(means.values())
        if total.requires_grad:
            total.backward()
        moved = tenants.step()
        if seen is not None:
            seen.append((moved, {name: value.item() for name, value in means.items()}))


def train_in_parts(tenants, batch, most):
    owners, tokens, labels = batch
    registry = tenants.model.flix_config.registry
    routing = registry.encode([{"tenant": owner} for owner in owners])
    for part in tenants.parts(routing, most):
        own = [owners[i] for i in part]
        losses, own_routing, counts = tokens_of(tenants.model, own, tokens[part], labels[part])
        assert own_routing.ids.tolist() == routing[part].ids.tolist()
        total = sum(tenants.losses(losses, routing[part], counts).values())
        if total.requires_grad:
            total.backward()
    tenants.step()


def alone(name, tenant, rows, limit=math.inf):
    """One tenant's run as anybody writes it: its rows, the mean loss, torch's clipping, optimizer and schedule."""
    made = model(name, [tenant])
    parameter = parameters_of(made)["tenant", tenant]
    optimizer = OPTIMIZERS[tenant]([parameter], lr=RATES[tenant])
    schedule = SCHEDULES[tenant](optimizer) if tenant in SCHEDULES else None
    taken, losses = 0, []
    for owners, tokens, labels in rows:
        mine = [i for i, owner in enumerate(owners) if owner == tenant]
        if not mine or taken == limit:
            continue
        found, _, counts = tokens_of(made, [tenant] * len(mine), tokens[mine], labels[mine])
        loss = found.sum() / counts.sum()
        loss.backward()
        if tenant in NORMS:
            torch.nn.utils.clip_grad_norm_([parameter], NORMS[tenant])
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        taken += 1
        losses.append(loss.item())
    return parameter.detach(), losses


def together(made, **changes):
    names = made.flix_config.registry.names("tenant")
    mine = {k: {n: v[n] for n in names if n in v} for k, v in SETTINGS.items()}
    return Tenants(made, "tenant", **{**mine, **changes})


SETTINGS = {"optimizer": OPTIMIZERS, "lr": RATES, "schedule": SCHEDULES, "steps": LIMITS, "max_norm": NORMS}  # fmt: skip


def difference(a, b):
    return float((a - b).abs().max())


def pairs(made, tenant):
    from flix.backends.torch.layer import flix_layers

    feature = ("tenant", tenant)
    return {
        path: (layer.flix_A[feature].detach().clone(), layer.flix_B[feature].detach().clone())
        for path, layer in flix_layers(made)
    }
