"""Checkpoints of several processes: read by any number of them, and whole or not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import flix  # noqa: E402
from flix.backends.torch import adapt, trainable_parameters  # noqa: E402
from flix.backends.torch.distributed import (  # noqa: E402
    last_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tests.backends.torch.distributed.checkpoint_worker import (  # noqa: E402
    EXTRA,
    check,
    held,
    made,
    train,
)
from tests.backends.torch.distributed.faults import found, kill_of, killed, same  # noqa: E402
from tests.helpers.processes import run_together  # noqa: E402

WORKER = "tests.backends.torch.distributed.checkpoint_worker"


@pytest.mark.slow
def test_two_processes_write_and_one_two_or_four_read(tmp_path: Path) -> None:
    run_together(2, WORKER, str(tmp_path), "save", timeout=240)
    run_together(4, WORKER, str(tmp_path), "load", timeout=240)
    model, optimizer = made()
    assert load_checkpoint(tmp_path / "steps", model, optimizer) == (3, EXTRA)
    check(held(model, optimizer), torch.load(tmp_path / "there.pt"))


def saved(folder: Path, *steps: int, **settings: Any) -> tuple[Any, Any]:
    model, optimizer = made()
    for step in steps:
        train(model, optimizer, [step])
        save_checkpoint(folder, model, optimizer, step, **settings)
    return model, optimizer


def test_one_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, *made()) == (0, None)
    model, optimizer = saved(tmp_path, 1, 2)
    train(model, optimizer, range(3, 6))
    again = made(lr=1.0)
    assert load_checkpoint(tmp_path, *again) == (2, None)
    train(*again, range(3, 6))
    check(held(*again), held(model, optimizer))
    assert load_checkpoint(tmp_path / "step-1", *made()) == (1, None)


def test_a_checkpoint_that_is_not_whole_is_none(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    assert last_checkpoint(tmp_path) == tmp_path / "step-3"
    part = tmp_path / "step-3" / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-1])  # a copy that was cut off
    assert last_checkpoint(tmp_path) == tmp_path / "step-2"
    (tmp_path / "step-2" / ".metadata").unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "step-1"
    (tmp_path / "step-1" / "flix_step.json").unlink()
    assert last_checkpoint(tmp_path) is None
    saved(tmp_path, 3)  # written anew over what is left
    assert last_checkpoint(tmp_path) == tmp_path / "step-3"


def test_nothing_has_the_checkpoints_name_before_all_is_written(
    tmp_path: Path, monkeypatch: Any
) -> None:
    from flix.backends.torch.distributed import checkpoints

    model, optimizer = saved(tmp_path, 1)
    seen = []

    def failing(path: Path, content: bytes) -> None:
        seen.append((sorted(p.name for p in tmp_path.glob("step-*")), path.parent.name))
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints, "write_file", failing)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, model, optimizer, 2)
    assert seen[0][0] == ["step-1"] and seen[0][1].startswith(".step-2.")
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_old_ones_are_removed(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "step-2" / "flix_step.json").unlink()  # as a removal that was killed leaves it
    saved(tmp_path, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3", "step-4"]
    with pytest.raises(flix.ConfigError, match="keep"):
        saved(tmp_path, 5, keep=0)


def test_folders_that_are_no_checkpoints_stay(tmp_path: Path) -> None:
    """A folder named as a checkpoint may hold somebody's samples; what is left of a checkpoint is removed."""
    saved(tmp_path, 2)
    for name in ("step-0/sample.txt", "step-3/sample.txt", "step-1/.metadata"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    with pytest.raises(flix.ConfigError, match="step-3' holds no checkpoint, and one would take its place"):  # fmt: skip
        saved(tmp_path, 3)
    saved(tmp_path, 4, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0", "step-3", "step-4"]
    assert (tmp_path / "step-0" / "sample.txt").exists() and (tmp_path / "step-3" / "sample.txt").exists()  # fmt: skip


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path, 1)
    with pytest.raises(flix.ConfigError, match="JSON-able"):
        save_checkpoint(tmp_path, model, optimizer, 2, {"x": float("nan")})
    other = torch.optim.AdamW([*trainable_parameters(model), torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(flix.ConfigError, match=r"1 parameters that are neither features .*\(3,\)"):
        save_checkpoint(tmp_path, model, other, 2)
    few = torch.optim.AdamW(trainable_parameters(model)[1:])
    with pytest.raises(flix.ConfigError, match="other parameters in them"):
        load_checkpoint(tmp_path, model, few)
    registry = flix.FeatureRegistry({"language": ["l0", "l1", "ibo"]})
    base = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 64))
    plain = adapt(base, flix.FlixConfig(registry=registry, ranks=2))
    optimizer = torch.optim.AdamW(trainable_parameters(plain))
    with pytest.raises(
        flix.ConfigError, match=r"has other features: language=l0 \(\d+ values there, \d+ here\)"
    ):
        load_checkpoint(tmp_path, plain, optimizer)


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_ends_at_the_same_bits(tmp_path: Path) -> None:
    """Under torchrun's own command, once in a step and once in a checkpoint; ``faults`` runs any number."""
    from tests.backends.torch.distributed import faults

    faults.command(tmp_path / "whole", "none", 0, 0, 0)
    whole = found(tmp_path / "whole")
    assert not killed(tmp_path / "whole")
    for number in range(2):
        faults.command(tmp_path / str(number), *kill_of(number))
        assert killed(tmp_path / str(number)) and same(found(tmp_path / str(number)), whole)
    shutil.rmtree(tmp_path / "whole" / "steps" / "step-12")  # what is compared can differ
    (tmp_path / "whole" / "steps" / "step-9").rename(tmp_path / "whole" / "steps" / "step-12")
    assert not same(found(tmp_path / "whole"), whole)
