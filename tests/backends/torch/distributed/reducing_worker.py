"""One process of a run that checks ``reduce_features``; started by test_reducing.py, told who it is by the environment.

Every check is a function of this module or of reducing_wrappers.py. The processes run them in the order of ``CHECKS``,
and print the names of those that hold. A check that fails prints its error, and ends the run.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flix
from flix.backends.torch import add_feature, freeze, remove_feature
from flix.backends.torch.distributed import reduce_features
from tests.backends.torch.distributed.reducing_models import (
    BATCHES,
    NONE,
    ROWS,
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
from tests.backends.torch.distributed.reducing_wrappers import (
    a_compiled_model,
    a_compiled_model_under_ddp_alone_is_refused,
    a_copy_under_ddp_is_refused,
    a_paged_model,
    a_scaler_sees_the_averages,
    accumulation_inside_ddp,
    accumulation_sends_once_a_step,
    checkpoints_of_both_kinds,
    ddp_by_itself_is_right,
    ddp_reduces_the_heads_alone,
    fsdp1_is_refused,
    heads_without_ddp,
)


def two_processes_equal_one() -> None:
    model = made()
    reference = copy.deepcopy(model)
    reduce_features(model)
    follow(model, reference)


def bytes_are_those_of_the_features_that_acted() -> None:
    model = made()
    reducer = reduce_features(model)
    optimizer, x = optimizer_of(model), inputs()
    features = model.flix_bank.features
    held = dict(zip(features, map(model.flix_bank.parameter, features), strict=True))
    for rows, names in (
        (ROWS, ["hau", "swa", "ner", "pos"]),
        ([{"language": "hau"}, {}, {"task": "ner"}, {}], ["hau", "ner"]),
        ([{"language": "zul"}, {}, {}, {}], ["zul"]),
        ([*NONE, *NONE], []),
    ):
        part = own(rows)
        step(model, optimizer, x[part], rows[part])
        sizes = sum(p.nbytes for (_, name), p in held.items() if name in names)
        last = reducer.last
        assert (last.sent, last.features) == (sizes, len(names))
        assert (last.told, last.calls) == (1024, 1 + bool(names))
        assert last.bytes == last.sent + last.told
        assert f"reduced {len(names)} of 5 features: {last.bytes:,} bytes" in str(reducer)
    assert reducer.total.steps == 4 and reducer.total.calls == 7


def a_feature_of_one_process_trains_alike_in_both() -> None:
    model = made()
    reduce_features(model)
    optimizer, x = optimizer_of(model), inputs()
    before = values(model)
    rows = [{"language": "zul"}, {"language": "zul"}, {"task": "ner"}, {"task": "ner"}]
    part = own(rows)
    step(model, optimizer, x[part], rows[part])
    moved = [n for n, v in values(model).items() if not torch.equal(before[n], v)]
    assert sorted(name.split(":")[-1] for name in moved) == ["ner", "zul"]
    assert_bits_everywhere(model)


def a_process_of_frozen_features_takes_part() -> None:
    model = made()
    freeze(model, [("language", "hau"), ("language", "swa")])
    reference = copy.deepcopy(model)
    reduce_features(model)
    optimizers, x = (optimizer_of(model), optimizer_of(reference)), inputs()
    rows = [{"language": "hau"}, {"language": "swa"}, {"task": "ner"}, {"task": "pos"}]
    for _ in range(3):
        part = own(rows)
        step(model, optimizers[0], x[part], rows[part])
        step(reference, optimizers[1], x, rows)
    assert_same(model, reference)
    assert_bits_everywhere(model)


def a_process_without_a_batch_takes_part_at_the_step() -> None:
    model = made()
    reference = copy.deepcopy(model)
    reduce_features(model)
    optimizers, x = (optimizer_of(model), optimizer_of(reference)), inputs()
    for number in range(4):
        if number % 2 == dist.get_rank():
            loss_of(model, x[:2], ROWS[:2]).backward()
        (loss_of(reference, x[:2], ROWS[:2]) / 2).backward()  # the other's gradient is zero
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, reference)
    assert_bits_everywhere(model)


def a_step_inside_no_sync_is_reduced_before_it() -> None:
    model = made()
    reference = copy.deepcopy(model)
    reducer = reduce_features(model)
    optimizers, x, part = (optimizer_of(model), optimizer_of(reference)), inputs(), own(ROWS)
    with reducer.no_sync():
        loss_of(model, x[part], ROWS[part]).backward()
        optimizers[0].step()
    loss_of(reference, x, ROWS).backward()
    optimizers[1].step()
    assert_same(model, reference)


def two_backwards_and_two_forwards() -> None:
    model = made()
    reference = copy.deepcopy(model)
    reducer = reduce_features(model)
    optimizers, x, part = (optimizer_of(model), optimizer_of(reference)), inputs(), own(ROWS)
    other = ROWS[::-1]
    for m, o, p in ((model, optimizers[0], part), (reference, optimizers[1], slice(None))):
        for together in (True, False, True):
            one, two = loss_of(m, x[p], ROWS[p]), loss_of(m, x[p] - 1, other[p])
            if together:
                (one + two).backward()
            else:
                one.backward(retain_graph=True)
                two.backward()
            o.step()
            o.zero_grad()
    assert reducer.total.steps == 4
    assert_same(model, reference)
    assert_bits_everywhere(model)


def a_loss_that_leaves_the_outputs_out() -> None:
    model = made()
    reference = copy.deepcopy(model)
    reduce_features(model)
    x, part = inputs(), own(ROWS)
    for m, p in ((model, part), (reference, slice(None))):
        loss_of(m, x[p], ROWS[p])
        m.hidden.square().mean().backward()
    for one, two in zip(model.flix_bank.parameters(), reference.flix_bank.parameters(), strict=True):  # fmt: skip
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-12)


def by_hand_before_clipping() -> None:
    model = made(heads=True)
    reference = copy.deepcopy(model)
    reducer = reduce_features(model, automatic=False)
    optimizers, x = (optimizer_of(model), optimizer_of(reference)), inputs()
    for rows in BATCHES:
        part = own(rows)
        loss_of(model, x[part], rows[part]).backward()
        assert reducer.reduce() is reducer.last
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.05)
        optimizers[0].step()
        optimizers[0].zero_grad()
        assert abs(float(norm) - step(reference, optimizers[1], x, rows)) <= 1e-12
    assert reducer.total.steps == len(BATCHES)
    assert_same(model, reference)


def a_reducer_that_was_stopped_sends_nothing() -> None:
    model = made(heads=True)
    reducer = reduce_features(model)
    reducer.stop()
    assert not hasattr(model, "no_sync")
    loss_of(model, inputs(), ROWS).backward()
    assert reducer.total.calls == 0
    model.hidden = None
    reference = copy.deepcopy(model)
    model.zero_grad()
    follow(model, reference, DistributedDataParallel(model, find_unused_parameters=True))


def it_begins_with_the_first_ones_values() -> None:
    model = made(heads=True, seed=dist.get_rank())
    reducer = reduce_features(model)
    assert_same(model, made(heads=True, seed=0), 0)
    unlike = sum(p.nbytes for p in model.parameters())
    again = reduce_features(model)
    assert again.start < unlike <= reducer.start
    assert_bits_everywhere(model)


def processes_that_differ_say_so() -> None:
    last = dist.get_world_size() - 1
    odd = dist.get_rank() == last
    registry = flix.FeatureRegistry(
        {"language": ["hau", "swa", "yor", "ibo" if odd else "zul"], "task": ["ner", "pos"]}
    )
    with_ranks = {"ranks": 2, "alpha": None}
    raised(
        lambda: reduce_features(made(registry=registry, **with_ranks)),
        f"rank {last} against rank 0",
        "without 'zul'",
        "with 'ibo'",
    )
    wide = {"ranks": 3 if odd else 2, "alpha": None}
    raised(lambda: reduce_features(made(**wide)), "ranks.language.hau: 3 against 2")
    raised(lambda: reduce_features(made(alpha=2.0 if odd else 3.0)), "alpha: 2.0 against 3.0")
    fewer = ["a", "b"] if odd else ["a", "b", "c"]
    raised(lambda: reduce_features(made(target_modules=fewer)), "layers: without 'c'")
    model = made()
    if odd:
        freeze(model, [("language", "swa")])
    raised(lambda: reduce_features(model), "frozen features: with 'language=swa'")
    model = made()
    if odd:
        model.flix_bank.float()
    raised(lambda: reduce_features(model), "language=hau: 'torch.float32' against 'torch.float64'")
    raised(lambda: reduce_features(made(heads=odd)), "trained heads: with 'head.weight'")


def processes_that_come_apart_say_so() -> None:
    model = made()
    reduce_features(model)
    optimizer, x, part = optimizer_of(model), inputs(), own(ROWS)

    def uneven() -> None:
        for _ in range(2):
            for _ in range(1 + dist.get_rank()):
                loss_of(model, x[part], ROWS[part]).backward()
            optimizer.step()

    raised(uneven, "are out of step", "rank 0: step 2", "rank 1: step 1", "no_sync()")


def features_that_come_later_are_reduced() -> None:
    model = made()
    reducer = reduce_features(model)
    add_feature(model, "language", "ibo", rank=2, freeze_others=False)
    reference = copy.deepcopy(model)
    rows = [{"language": "ibo"}, {"task": "ner"}, {"language": "hau"}, {"language": "ibo"}]
    batches = (rows, ROWS, rows)
    follow(model, reference, batches=batches)
    remove_feature(model, "language", "swa")
    optimizer, part = optimizer_of(model), own(rows)
    step(model, optimizer, inputs()[part], rows[part])
    assert reducer.last.features == 3
    assert_bits_everywhere(model)


def a_change_in_one_process_is_named() -> None:
    model = made()
    reduce_features(model)
    if dist.get_rank() == 1:
        add_feature(model, "language", "ibo", rank=2, freeze_others=False)
    part = own(ROWS)
    raised(lambda: loss_of(model, inputs()[part], ROWS[part]).backward(), "with 'ibo'")
    model = made()
    reduce_features(model)
    if dist.get_rank() == 0:
        freeze(model, [("task", "pos")])
    raised(
        lambda: loss_of(model, inputs()[part], ROWS[part]).backward(),
        "frozen features: without 'task=pos'",
    )


def processes_that_train_apart() -> None:
    """A group of one: nothing is sent."""
    rank = dist.get_rank()
    groups = [dist.new_group([other]) for other in range(dist.get_world_size())]
    model = made(seed=rank)
    reference = copy.deepcopy(model)
    reducer = reduce_features(model, groups[rank])
    optimizers, x = (optimizer_of(model), optimizer_of(reference)), inputs()
    for _ in range(1 + rank):
        step(model, optimizers[0], x[:2], ROWS[:2])
        step(reference, optimizers[1], x[:2], ROWS[:2])
    assert_same(model, reference, 0)
    assert reducer.total.bytes == reducer.total.calls == 0


CHECKS = [
    two_processes_equal_one,
    bytes_are_those_of_the_features_that_acted,
    a_feature_of_one_process_trains_alike_in_both,
    a_process_of_frozen_features_takes_part,
    a_process_without_a_batch_takes_part_at_the_step,
    accumulation_sends_once_a_step,
    accumulation_inside_ddp,
    a_step_inside_no_sync_is_reduced_before_it,
    two_backwards_and_two_forwards,
    checkpoints_of_both_kinds,
    a_loss_that_leaves_the_outputs_out,
    by_hand_before_clipping,
    a_scaler_sees_the_averages,
    heads_without_ddp,
    ddp_reduces_the_heads_alone,
    ddp_by_itself_is_right,
    a_copy_under_ddp_is_refused,
    a_reducer_that_was_stopped_sends_nothing,
    it_begins_with_the_first_ones_values,
    processes_that_differ_say_so,
    processes_that_come_apart_say_so,
    features_that_come_later_are_reduced,
    a_change_in_one_process_is_named,
    a_compiled_model,
    a_compiled_model_under_ddp_alone_is_refused,
    processes_that_train_apart,
    a_paged_model,
    fsdp1_is_refused,
]


def main(chosen: Sequence[str] = ()) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", timeout=timeout)
    for check in CHECKS:
        if chosen and check.__name__ not in chosen:
            continue
        try:
            check()
            failed = ""
        except Exception:
            failed = traceback.format_exc()
        print(f"fails {check.__name__}\n{failed}" if failed else f"holds {check.__name__}", flush=True)  # fmt: skip
        if failed:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
