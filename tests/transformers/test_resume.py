"""Resumed runs are those that never stopped."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from flix import ConfigError  # noqa: E402
from flix.transformers import last_checkpoint  # noqa: E402
from flix.transformers.checkpoints import begin, incomplete  # noqa: E402
from tests.helpers.registry import registry  # noqa: E402
from tests.helpers.stops import Stopped, stopping  # noqa: E402
from tests.helpers.transformers import dataset, losses, rows, same, state, trainer  # noqa: E402

RESUME = {
    "plain": {"max_steps": 5, "save_steps": 2},
    "second epoch, accumulated, workers": {
        "max_steps": 7,
        "save_steps": 5,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 2,
    },
    "epoch's end, persistent workers": {
        "max_steps": 9,
        "save_steps": 7,
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
    },
    "evaluated, persistent workers": {
        "max_steps": 7,
        "save_steps": 4,
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
}


def ran(folder: Path, resume: Path | None = None, **settings: Any) -> tuple[Any, Any, Any]:
    """A run's state, log and batches; its workers end with it."""
    made = trainer(folder, **settings)
    made.train(resume_from_checkpoint=resume)
    return state(made), losses(made), made.seen


@pytest.mark.parametrize("name", RESUME)
def test_resume_is_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Weights, optimizer, losses and dropout masks, with shuffling, the base's dropout and a schedule."""
    settings = {"save_strategy": "steps", "lr_scheduler_type": "cosine", "warmup_steps": 2, **RESUME[name]}  # fmt: skip
    settings["eval_dataset"] = dataset(5)
    whole, log, seen = ran(tmp_path / "a", **settings)
    kept = settings["save_steps"]
    torch.manual_seed(999)
    again, relogged, masks = ran(tmp_path / "b", tmp_path / "a" / f"checkpoint-{kept}", **settings)
    assert same(whole, again)
    assert relogged == log and sum(entry["step"] > kept for entry in log) >= 2
    skipped = kept * settings.get("gradient_accumulation_steps", 1)
    assert len(seen) == len(masks) + skipped - (1 if "accum" in name else 0)
    for one, two in zip(reversed(seen), reversed(masks), strict=False):
        assert torch.equal(one, two)
    # Something was dropped, and not always the same.
    assert any((ids >= 0).sum(1).min() < 1 for ids in seen)


def test_streams_resume(tmp_path: Path) -> None:
    """A stream is read again up to where the run stopped; masks and weights are those of the whole run."""
    settings = {"max_steps": 6, "save_steps": 4, "save_strategy": "steps"}
    stream = dataset(30).to_iterable_dataset(num_shards=2)
    whole = trainer(tmp_path / "a", data=stream, **settings)
    whole.train()
    again = trainer(tmp_path / "b", data=stream, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert [ids.tolist() for ids in again.seen] == [ids.tolist() for ids in whole.seen[4:]]
    assert same(state(whole), state(again))


def test_mixtures_resume(tmp_path: Path) -> None:
    """flix.data's mixture, which gives other rows in each epoch, in the second of them."""
    from flix.data import Mixture

    def run(folder: Path, resume: Path | None = None) -> tuple[Any, Any]:
        held = [{**row, "language": row["language"] or "yor"} for row in rows()]
        mixture = Mixture([datasets.Dataset.from_list(held)], registry=registry(), epoch_size=9)
        made = trainer(
            folder,
            data=mixture.train,
            callbacks=[mixture.callback()],
            max_steps=6,
            save_steps=4,
            save_strategy="steps",
            dataloader_num_workers=1,
        )
        made.train(resume_from_checkpoint=resume)
        return state(made), made.seen

    whole, seen = run(tmp_path / "a")
    again, masks = run(tmp_path / "b", tmp_path / "a" / "checkpoint-4")
    assert same(whole, again)
    assert [ids.tolist() for ids in masks] == [ids.tolist() for ids in seen[4:]]


def test_last_checkpoint_of_flix_before_format_2_is_complete(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step, text in ((2, "{}"), (10, "{}"), (12, '{"epoch":'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


SAVED = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}


def run(folder: Path, seed: int = 0, **settings: Any) -> Any:
    made = trainer(folder, **{**SAVED, "seed": seed, **settings})
    made.train()
    return made


def test_a_checkpoint_names_all_of_its_files(tmp_path: Path) -> None:
    run(tmp_path)
    folder = tmp_path / "checkpoint-4"
    said = json.loads((folder / "flix_checkpoint.json").read_text())
    held = {path.name for path in folder.iterdir()} - {"flix_checkpoint.json"}
    assert {*said["files"]} == held
    assert {"flix.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= held  # fmt: skip
    assert incomplete(folder) is None and last_checkpoint(tmp_path) == folder
    (folder / "notes.txt").write_text("mine")
    assert last_checkpoint(tmp_path) == folder


def test_a_checkpoint_that_is_half_another_runs_is_passed_over(tmp_path: Path) -> None:
    """Whichever of its files are the other run's, and however they came there."""
    run(tmp_path / "a")
    run(tmp_path / "b", seed=7)
    one, other = (tmp_path / name / "checkpoint-4" for name in "ab")
    differ = [p.name for p in one.iterdir() if p.read_bytes() != (other / p.name).read_bytes()]
    assert {"flix.safetensors", "optimizer.pt", "flix_checkpoint.json"} <= {*differ}
    for name in differ:
        kept = (one / name).read_bytes()
        for content in ((other / name).read_bytes(), kept[: len(kept) // 2], b"", None):
            if content is None:
                (one / name).unlink()
            else:
                (one / name).write_bytes(content)
            assert incomplete(one) is not None, name
            assert last_checkpoint(tmp_path / "a") == tmp_path / "a" / "checkpoint-2"
        with pytest.raises(ConfigError, match="is not complete"):
            trainer(tmp_path / "a", **SAVED).train(resume_from_checkpoint=str(one))
        (one / name).write_bytes(kept)
    assert incomplete(one) is None


def test_a_run_that_is_stopped_over_anothers_checkpoints_leaves_none_that_is_mixed(
    tmp_path: Path,
) -> None:
    wanted = run(tmp_path / "new", seed=7, save_steps=4)
    adapters = {}
    for seed, name in ((0, "old"), (7, "new")):
        run(tmp_path / name, seed=seed)
        adapters[name] = (tmp_path / name / "checkpoint-4" / "flix.safetensors").read_bytes()
    assert adapters["old"] != adapters["new"]
    made = wanted
    seen = set()
    for stopped in range(1, 60, 3):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(tmp_path / "old", tmp_path / "x")
        made.args.output_dir = str(tmp_path / "x")
        with stopping(stopped, tidy=False) as begun, suppress(Stopped):
            made._save_checkpoint(made.model, None)
        found = last_checkpoint(tmp_path / "x")
        assert found is not None
        if found.name == "checkpoint-2":
            seen.add("earlier")
            continue
        is_new = (found / "flix.safetensors").read_bytes() == adapters["new"]
        optimizer = torch.load(found / "optimizer.pt")
        reference = torch.load(tmp_path / ("new" if is_new else "old") / "checkpoint-4" / "optimizer.pt")  # fmt: skip
        assert str(optimizer["state"]) == str(reference["state"])
        seen.add("new" if is_new else "old")
        if stopped > len(begun):
            break
    assert seen == {"old", "earlier", "new"}


def test_manifests_of_strangers_name_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for files in ({"../outside": {}}, {str(tmp_path / "outside"): {}}, [], 7, None):
        (folder / "flix_checkpoint.json").write_text(json.dumps({"files": files}))
        assert incomplete(folder) == "flix_checkpoint.json is damaged" or files == []
        begin(folder)
        assert (tmp_path / "outside").read_text() == "mine"
        assert not (folder / "flix_checkpoint.json").exists()
