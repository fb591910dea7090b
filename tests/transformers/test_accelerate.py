"""Loops of one's own with accelerate, and two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import flix  # noqa: E402
from flix.backends.torch import load, save, trainable_parameters  # noqa: E402
from flix.transformers import FlixCollator, numbered  # noqa: E402
from tests.helpers.registry import TASKS, registry  # noqa: E402
from tests.helpers.torch import live_pairs  # noqa: E402
from tests.helpers.transformers import classifier, dataset, rows, trainer  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_state() -> Any:
    """accelerate's state is one for a process; other tests chose another precision."""
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


def loop(steps: int, folder: Path, resume: int = 0, precision: str = "no") -> dict[str, Any]:
    """Micro-steps of a loop with accumulation, which saves after each, and may go on after one of them."""
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    torch.manual_seed(0)
    model = classifier()
    if resume:
        load(model, folder / str(resume))
    collate = FlixCollator(model.flix_config, seed=5)
    held = [{k: v for k, v in row.items() if k != "text"} for row in rows(24)]
    loader = torch.utils.data.DataLoader(held, batch_size=4, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=0.01, fused=True)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, numbered(loader, processes=accelerator.num_processes, seed=3)
    )
    if resume:
        held_state = torch.load(folder / str(resume) / "rest.pt", weights_only=True)
        optimizer.load_state_dict(held_state["optimizer"])
        torch.set_rng_state(held_state["rng"])
    model.train()
    step, ids = resume, []
    for batch in accelerator.skip_first_batches(loader, resume):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        ids.append(batch["flix_features"].numpy())
        plain = accelerator.unwrap_model(model)
        save(plain, folder / str(step))
        rest = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        torch.save(rest, folder / str(step) / "rest.pt")
        if step == steps:
            break
    return {
        "pairs": {n: p.detach().clone() for n, p in live_pairs(plain).items()},
        "head": plain.classifier.weight.detach().clone(),
        "ids": ids,
    }


def test_a_loop_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Accumulation of two micro-steps, dropout of features and of the base, shuffling; resumed after four."""
    whole = loop(6, tmp_path)
    again = loop(6, tmp_path, resume=4)
    assert len(again["ids"]) == 2
    for one, two in zip(whole["ids"][4:], again["ids"], strict=True):
        assert np.array_equal(one, two)
    assert torch.equal(whole["head"], again["head"])
    for name, value in whole["pairs"].items():
        assert torch.equal(value, again["pairs"][name]), name


def test_a_loop_in_bf16(tmp_path: Path) -> None:
    wide, half = loop(6, tmp_path), loop(6, tmp_path, precision="bf16")
    moved = 0
    for name, value in wide["pairs"].items():
        assert half["pairs"][name].dtype == torch.float32
        if ".B." in name:
            moved += bool(half["pairs"][name].abs().max() > 0)
            difference = (half["pairs"][name] - value).abs().max()
            assert difference <= 0.04  # Adam moves each value by about 0.01 a step, three times
    assert moved > 40
    assert not torch.equal(half["head"], wide["head"])


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def processes(kind: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """What each of some processes found."""
    folder.mkdir()
    common = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
    }  # fmt: skip
    workers = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.transformers.loop_worker", kind, str(folder)],
                cwd=ROOT,
                env={**common, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        texts = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, text in zip(workers, texts, strict=True):
        assert worker.returncode == 0, text
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.slow
def test_two_processes_share_the_steps_masks(tmp_path: Path) -> None:
    """accelerate's loop: the two halves of every step have the rows and masks that one process would give them."""
    found = processes("accelerate", 2, tmp_path / "two")
    assert [f["processes"] for f in found] == [2, 2]
    collate = FlixCollator(classifier().flix_config, seed=5)
    held = rows(22)
    assert len(found[0]["seen"]) == len(found[1]["seen"]) == 2 * 4
    orders: list[list[int]] = [[], []]
    for step, halves in enumerate(zip(found[0]["seen"], found[1]["seen"], strict=True)):
        last = step % 4 == 3  # 22 rows: the last step is filled up with rows of the first
        whole = [number for half in halves for number in half[0]]
        orders[step // 4] += whole
        if not last:
            wanted = collate([held[n] for n in whole], step=step)["flix_features"].tolist()
            assert wanted == [ids for half in halves for ids in half[1]]
    for order in orders:
        assert sorted(order[:22]) == list(range(22)) and order[22:] == order[:2]
    assert orders[0] != orders[1]


@pytest.mark.slow
def test_two_processes_of_the_trainer(tmp_path: Path) -> None:
    """DDP: masks numbered over both processes, losses by feature over all rows, one adapter."""
    one, two = processes("trainer", 2, tmp_path / "two")
    assert one["processes"] == 2 and one["sum"] == two["sum"]
    for entry, other in zip(one["log"], two["log"], strict=True):
        # Sums over all processes: every process logs the same.
        assert {k: v for k, v in entry.items() if "loss/" in k} == {k: v for k, v in other.items() if "loss/" in k}  # fmt: skip
    assert any(k.startswith("loss/language=") for k in one["log"][0])
    # 7 rows on two processes of 2: the row that fills the last batch up, seen before, counts once.
    alone = trainer(tmp_path / "one", eval_dataset=dataset(7)).evaluate()
    wanted = {k: v for k, v in alone.items() if k.startswith("eval_loss/")}
    assert len(wanted) == 6
    for found in (one, two):
        assert {k: found["before"][k] for k in wanted} == pytest.approx(wanted, rel=1e-5)
    folder = tmp_path / "two" / "out"
    model = load(classifier(), next(folder.glob("checkpoint-*")))
    assert set(model.flix_config.registry.names("task")) == set(TASKS)
    assert len(one["seen"]) == len(two["seen"]) == 10
    dropout = flix.FeatureDropout(p=0.3)
    for step, (left, right) in enumerate(zip(one["seen"], two["seen"], strict=True)):
        if step % 5 == 4:
            continue
        found = np.array(left + right)
        # A dropped feature is one that the mask of (step, row) drops: none that it keeps is missing from all rows.
        full = np.full((6, 6), 0)
        routing = flix.Routing(np.arange(6, dtype=np.int32) + full.astype(np.int32), np.ones((6, 6), np.float32), registry())  # fmt: skip
        kept = dropout(routing, seed=5, step=step).ids
        for row in range(6):
            assert set(found[row]) <= set(kept[row]) | {-1}
