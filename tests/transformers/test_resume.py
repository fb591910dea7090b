"""Resumed runs are those that never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from flix.transformers import last_checkpoint  # noqa: E402
from tests.helpers.registry import registry  # noqa: E402
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


def test_last_checkpoint_is_complete(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step, text in ((2, "{}"), (10, "{}"), (12, '{"epoch":'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
