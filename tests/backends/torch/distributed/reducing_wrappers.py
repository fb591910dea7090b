"""What reducing_worker.py checks where DDP, a compiler, pages, checkpoints or a scaler stand around the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flix.backends.torch import page
from flix.backends.torch.distributed import reduce_features
from tests.backends.torch.distributed.reducing_models import (
    BATCHES,
    ROWS,
    D,
    assert_bits_everywhere,
    assert_same,
    follow,
    inputs,
    loss_of,
    made,
    optimizer_of,
    own,
    raised,
    step,
    values,
)
from tests.helpers.registry import config


def accumulation_sends_once_a_step(wrapped: bool = False) -> None:
    model = made(heads=True)
    reference = copy.deepcopy(model)
    reducer = reduce_features(model)
    run = DistributedDataParallel(model) if wrapped else model
    optimizers, x = (optimizer_of(model), optimizer_of(reference)), inputs()
    for rows in (ROWS, ROWS[::-1]):
        part, other = own(rows), ROWS[1:] + ROWS[:1]
        sent = reducer.total.calls
        with run.no_sync():
            loss_of(run, x[part], rows[part]).backward()
        assert reducer.total.calls == sent
        step(run, optimizers[0], x[part] + 1, other[part])
        assert reducer.total.calls == sent + 2
        loss_of(reference, x, rows).backward()
        step(reference, optimizers[1], x + 1, other)
    assert_same(model, reference)
    assert_bits_everywhere(model)


def accumulation_inside_ddp() -> None:
    accumulation_sends_once_a_step(wrapped=True)


def checkpoints_of_both_kinds() -> None:
    for kind in ("reentrant", "plain"):
        model = made(checkpoints=kind)
        reference = copy.deepcopy(model)
        reducer = reduce_features(model)
        follow(model, reference)
        assert reducer.total.steps == len(BATCHES)


def a_scaler_sees_the_averages() -> None:
    model = made()
    reference = copy.deepcopy(model)
    reduce_features(model)
    x, part = inputs(), own(ROWS)
    for m, p in ((model, part), (reference, slice(None))):
        optimizer, scaler = optimizer_of(m), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number in range(4):
            loss = loss_of(m, x[p], ROWS[p])
            if number == 2 and (m is reference or dist.get_rank() == 1):
                loss = loss * float("inf")  # in one process alone: all of them pass the step over
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(m.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same(model, reference)
    assert_bits_everywhere(model)


def heads_without_ddp() -> None:
    model = made(heads=True)
    reference = copy.deepcopy(model)
    reduce_features(model)
    follow(model, reference)


def ddp_reduces_the_heads_alone() -> None:
    model = made(heads=True)
    reference = copy.deepcopy(model)
    reducer = reduce_features(model)
    run = DistributedDataParallel(model)
    assert sum(p.numel() for p in run._module_parameters if p.requires_grad) == D * D + D
    follow(model, reference, run)
    held = {*model.flix_bank.parameters()}
    most = sum(p.nbytes for p in held)
    assert reducer.last.sent < most, "the head, or an absent feature, was sent, too"


def ddp_by_itself_is_right() -> None:
    model = made(heads=True)
    reference = copy.deepcopy(model)
    follow(model, reference, DistributedDataParallel(model, find_unused_parameters=True))


def a_copy_under_ddp_is_refused() -> None:
    model = made(heads=True)
    reduce_features(model)
    twin = copy.deepcopy(model)
    assert twin.flix_state.reducer is None
    run, part = DistributedDataParallel(twin), own(ROWS)
    raised(lambda: loss_of(run, inputs()[part], ROWS[part]), "reduce_features(model) before DDP")


def a_compiled_model() -> None:
    """Absent features keep their bits in all processes, whatever each of them sees."""
    model = made(heads=True)
    reference = copy.deepcopy(model)
    reducer = reduce_features(model)
    ids = {"features": None}

    def forward(m: Any, x: Any, rows: Any) -> Any:
        encoded = model.flix_config.registry.encode(rows, width=3)
        ids["features"] = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.weights)
        return m(x, flix_features=ids["features"][0], flix_weights=ids["features"][1])

    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizers, x, before = (optimizer_of(model), optimizer_of(reference)), inputs(), values(model)
    for rows in BATCHES:
        part, norms = own(rows), []
        for m, o, runner, p in (
            (model, optimizers[0], run, part),
            (reference, optimizers[1], reference, slice(None)),
        ):
            forward(runner, x[p], rows[p])["out"][0].square().mean().backward()
            norms.append(float(nn.utils.clip_grad_norm_(m.parameters(), 0.05)))
            o.step()
            o.zero_grad()
        assert abs(norms[0] - norms[1]) <= 1e-12
    assert_same(model, reference)
    assert_bits_everywhere(model)
    assert torch.equal(values(model)["flix_bank.language:zul"], before["flix_bank.language:zul"])
    assert reducer.total.steps == len(BATCHES) and reducer.last.features == 4


def a_compiled_model_under_ddp_alone_is_refused() -> None:
    model = made(heads=True)
    run = DistributedDataParallel(
        torch.compile(model, backend="aot_eager"), find_unused_parameters=True
    )
    encoded, optimizer, part = config().registry.encode(ROWS), optimizer_of(model), own(ROWS)
    ids, weights = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.weights)
    out = run(inputs()[part], flix_features=ids[part], flix_weights=weights[part])["out"][0]
    out.square().mean().backward()
    raised(optimizer.step, "reduce_features(model)", "a group of one")


def a_paged_model() -> None:
    model = made()
    reference = copy.deepcopy(model)
    page(model, 1 << 20)
    reduce_features(model)
    follow(model, reference)


def fsdp1_is_refused() -> None:
    import warnings

    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = made()
            if not original:
                model.requires_grad_(True)  # what FSDP1 asks for there
            run = FullyShardedDataParallel(
                model, use_orig_params=original, device_id=torch.device("cpu")
            )
        encoded = config().registry.encode(ROWS)
        raised(
            lambda run=run, ids=encoded: run(inputs(), flix_features=ids), "FSDP1", "fully_shard"
        )
