"""One process of several that share sharded features; started by test_sharding.py.

python -m tests.backends.torch.distributed.sharding_worker FOLDER {alone|fsdp|ddp} ...
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import flix
from flix.backends.torch import (
    adapt,
    add_feature,
    clip_grad_norm_by_feature_,
    export_peft,
    freeze,
    load,
    merge,
    named_pairs,
    remove_feature,
    rename_feature,
    save,
    search_weights,
    shard_features,
    summary,
    thaw,
    trainable_parameters,
    whole_features,
)  # fmt: skip
from flix.backends.torch.parameters import whole
from tests.helpers.registry import ROWS, config
from tests.helpers.tolerance import assert_close
from tests.helpers.torch import batch, make, output, parameters_of, randomize, routing

STEPS = (ROWS, ROWS[::-1], [{"language": "swa"}] * 2 + [{"task": "ner"}] * 2)


def close(model: Any, reference: Any, what: str) -> None:
    wanted = named_pairs(reference)
    found = named_pairs(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(torch.from_numpy(found[name]), torch.from_numpy(value), name=f"{what} {name}", times=10)  # fmt: skip


def wrapped(kind: str, model: Any, mesh: Any) -> Any:
    """The model as it is run, with its features sharded."""
    shard_features(model, mesh)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        features = set(model.flix_bank.parameters())
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=features)
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    return model


def optimizer_of(model: Any) -> Any:
    return torch.optim.AdamW(trainable_parameters(model), lr=0.05, weight_decay=0.5)


def step(model: Any, optimizer: Any, rows: Any, part: slice) -> None:
    optimizer.zero_grad()
    ids, weights = routing(rows)
    some = {name: value[part] for name, value in batch("llama").items()}
    result = output(model(**some, flix_features=ids[part], flix_weights=weights[part]))
    result.square().mean().backward()
    optimizer.step()


def main(folder: Path, *kinds: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for kind in kinds:
        check(kind, folder / kind)
    dist.barrier()
    dist.destroy_process_group()
    print("same as one process")


def check(kind: str, folder: Path) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = adapt(make("llama", torch.float64), config()).train()
    randomize(model)
    if kind != "alone":
        model.lm_head.weight.requires_grad_(True)
    reference = copy.deepcopy(model)
    start = named_pairs(model)
    total = sum(p.nbytes for p in model.flix_bank.parameters())
    runner = wrapped(kind, model, mesh)
    features = parameters_of(model)
    held = sum(p.to_local().nbytes for p in features.values())
    slack = len(features) * 8  # a part is at most one value of each feature larger
    assert abs(held - total / world) <= slack, (held, total)
    optimizer, plain = optimizer_of(model), optimizer_of(reference)
    share = len(ROWS) // world
    part = slice(share * rank, share * (rank + 1))
    size = {f: p.numel() * 8 for f, p in features.items()}
    for rows in STEPS:
        step(runner, optimizer, rows, part)
        step(reference, plain, rows, slice(0, len(ROWS)))
        # One call each way; what is sent back are the active features, padded to equal parts.
        used = sorted({f for f in features if any(f in named(row) for row in rows)})
        moved, due = model.flix_bank.sharding.last, sum(size[f] for f in used)
        assert (moved.calls, moved.features, moved.registered) == (3, len(used), len(features))
        assert due <= moved.sent <= due + len(used) * 8 * (world - 1)
        assert moved.gathered * world == moved.sent and moved.told == 4 * (6 + 2)
    close(model, reference, "after training")
    for name, value in named_pairs(model).items():
        if name.endswith(".zul"):
            assert (value == start[name]).all(), f"{name} is absent everywhere, but moved"
    zul = features["language", "zul"]
    assert zul.grad is None and zul not in optimizer.state
    kept = sum(v.to_local().nbytes for s in optimizer.state.values() for v in s.values() if hasattr(v, "to_local"))  # fmt: skip
    mine = [
        p for p in trainable_parameters(model) if p in optimizer.state and hasattr(p, "to_local")
    ]
    assert kept == 2 * sum(p.to_local().nbytes for p in mine)

    check_evaluation(model, reference, rank)
    if kind == "alone":
        check_checkpointing(model, reference, part)
        check_refusals(model, mesh)
    check_files(kind, model, reference, folder)
    if kind != "fsdp":
        check_life(model, reference, optimizer, plain, runner, part)


def named(row: Any) -> set[Any]:
    return {(g, n) for g, v in row.items() for n in ([v] if isinstance(v, str) else v)}


def check_checkpointing(model: Any, reference: Any, part: slice) -> None:
    """Both kinds of activation checkpointing give the gradients, and clipping by feature the norms, of one process."""
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for m, some in ((model, part), (reference, slice(0, 4))):
            m.zero_grad()
            ids = routing()[0][some]
            result = output(m(input_ids=batch("llama")["input_ids"][some], flix_features=ids))
            result.square().mean().backward()
        one, two = (clip_grad_norm_by_feature_(m, 1e-3) for m in (model, reference))
        assert one.keys() == two.keys()
        for feature, norm in two.items():
            assert_close(whole(one[feature]), norm, name=f"norm {feature}", times=10)
            grads = [whole(parameters_of(m)[feature].grad) for m in (model, reference)]
            assert_close(*grads, name=f"gradient {feature}", times=10)
    model.gradient_checkpointing_disable()
    model.zero_grad(), reference.zero_grad()


def check_evaluation(model: Any, reference: Any, rank: int) -> None:
    """Processes run unequal numbers of forwards, and generate texts of unequal lengths."""
    ids, weights = routing()
    inputs = batch("llama")
    model.eval(), reference.eval()
    uneven = type(model).__name__.startswith("FSDP")
    with torch.no_grad(), whole_features(model):
        for i in range(1 if uneven else rank + 1):
            row = slice(i % 4, i % 4 + 1)
            some = {name: value[row] for name, value in inputs.items()}
            asked = {"flix_features": ids[row], "flix_weights": weights[row]}
            found, wanted = (output(m(**some, **asked)) for m in (model, reference))
            assert_close(found, wanted, name="evaluation", times=10)
        if not uneven:
            asked = {"flix_features": ids[:2], "max_new_tokens": 2 + 3 * rank, "do_sample": False}
            prompts = inputs["input_ids"][:2]
            texts = [m.generate(prompts, **asked) for m in (model, reference)]
            assert torch.equal(*texts)
    if not uneven:
        check_search(model, reference, rank)
    with torch.no_grad(), whole_features(model, {"language": "hau"}):
        model(**inputs, flix_features=routing([{"language": "hau"}] * 4)[0])
        with pytest.raises(
            flix.ConfigError, match="some features only, but the batch also has language=swa"
        ):
            model(**inputs, flix_features=routing([{"language": "swa"}] * 4)[0])
    model.train(), reference.train()


def check_search(model: Any, reference: Any, rank: int) -> None:
    """Each process searches by itself."""
    examples = {k: v[: rank + 1] for k, v in batch("llama").items()}
    settings: dict[str, Any] = {
        "loss": loss_of,
        "steps": 2 + rank,
        "l1": 0.0,
        "groups": ["language"],
    }
    with pytest.raises(flix.ConfigError, match="search under `with whole_features"):
        search_weights(model, examples, {"task": "ner"}, **settings)
    with whole_features(model):
        one, two = (search_weights(m, examples, {"task": "ner"}, **settings) for m in (model, reference))  # fmt: skip
    assert one.row.keys() == two.row.keys() and len(one.history) == len(two.history) > rank
    for found, wanted in zip(one.history, two.history, strict=True):
        assert abs(found - wanted) < 1e-9


def loss_of(outputs: Any, _: Any) -> Any:
    return output(outputs).double().square().mean()


def check_refusals(model: Any, mesh: Any) -> None:
    ids, _ = routing()
    inputs = batch("llama")
    with torch.no_grad(), pytest.raises(flix.ConfigError, match="under `with whole_features"):
        model(**inputs, flix_features=ids)
    with whole_features(model):
        with pytest.raises(flix.ConfigError, match="whole_features holds copies"):
            model(**inputs, flix_features=ids)
        with pytest.raises(flix.ConfigError, match="entered already"), whole_features(model):
            pass
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()
        with torch.no_grad(), pytest.raises(flix.ConfigError, match="optimizer has stepped"):
            model(**inputs, flix_features=ids)
    twice = torch.optim.SGD([*parameters_of(model).values()])
    twice.param_groups[0]["params"].append(parameters_of(model)["task", "ner"])
    with pytest.raises(flix.ConfigError, match="the parameter of task=ner more than once"):
        twice.step()
    with pytest.raises(flix.ConfigError, match="sharded already"):
        shard_features(model, mesh)
    with pytest.raises(flix.ConfigError, match="needs a DeviceMesh, got str"):
        shard_features(model, "cpu")
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(flix.ConfigError, match=r"lm_head.weight trains with sharded features"):
        model(**inputs, flix_features=ids)
    model.lm_head.weight.requires_grad_(False)
    if dist.get_rank() == 0:
        freeze(model, {"task": "ner"})
    with pytest.raises(flix.ConfigError, match="do not train the same features"):
        model(**inputs, flix_features=ids)
    thaw(model)
    result = output(model(**inputs, flix_features=ids))
    with torch.no_grad():
        next(iter(parameters_of(model).values())).mul_(1.0)
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        result.sum().backward()


def check_files(kind: str, model: Any, reference: Any, folder: Path) -> None:
    """One process writes; what all read is whole."""
    save(model, folder / "adapter")
    fresh = load(make("llama", torch.float64), folder / "adapter")
    close(fresh, reference, "saved")
    if kind != "alone":
        assert_close(fresh.lm_head.weight, reference.lm_head.weight, name="head", times=10)
    for parameter in parameters_of(model).values():
        with torch.no_grad():
            parameter.zero_()
    load(model, folder / "adapter")
    close(model, fresh, "loaded")
    if kind != "alone":
        assert torch.equal(whole(model.lm_head.weight.detach()), fresh.lm_head.weight)
    assert str(summary(model)) == str(summary(fresh))
    row = {"language": "hau", "task": "pos"}
    export_peft(model, row, folder / "lora")
    assert (folder / "lora" / "adapter_config.json").exists()
    if kind == "fsdp":
        with pytest.raises(flix.TargetError, match="fully_shard"):
            merge(model, row)
        return
    one, two = merge(model, row), merge(fresh, row)
    with torch.no_grad():
        assert torch.equal(output(one(**batch("llama"))), output(two(**batch("llama"))))


def check_life(
    model: Any, reference: Any, optimizer: Any, plain: Any, runner: Any, part: slice
) -> None:
    """Features join, leave, get other names, freeze and thaw, and training goes on."""
    load_same = named_pairs(model)
    for m in (model, reference):
        freeze(m, {"task": "ner"})
        rename_feature(m, "language", "swa", "swh")
        remove_feature(m, "language", "zul")
        add_feature(m, "language", "ibo", init_from="hau", freeze_others=False)
        freeze(m, {"task": "ner"})
    assert ("language", "ibo") in parameters_of(model)
    added = parameters_of(model)["language", "ibo"]
    assert hasattr(added, "to_local")
    optimizer.add_param_group({"params": [added]})
    plain.add_param_group({"params": [parameters_of(reference)["language", "ibo"]]})
    encoded = model.flix_config.registry.encode(
        [{"language": "ibo", "task": "ner"}, {"language": "swh"}] * 2
    )
    before = {n: v for n, v in load_same.items() if n.endswith(".ner")}
    for m, o, some in ((runner, optimizer, part), (reference, plain, slice(0, 4))):
        o.zero_grad()
        ids = torch.from_numpy(encoded.ids)[some]
        result = output(m(input_ids=batch("llama")["input_ids"][some], flix_features=ids))
        result.square().mean().backward()
        o.step()
    close(model, reference, "after changes")
    after = named_pairs(model)
    assert all((after[n] == v).all() for n, v in before.items()), "a frozen feature moved"
    for m in (model, reference):
        thaw(m)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
