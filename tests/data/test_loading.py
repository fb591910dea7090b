"""Mixtures in the loaders of others: DataLoader with workers, Accelerate, the Trainer."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from flix.data import Mixture
from flix.data.epoch import SharedEpoch
from tests.helpers.data import rows_of

torch = pytest.importorskip("torch")


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


def mixture(epoch_size: int | None = 12) -> Mixture:
    return Mixture([rows_of("hau", "ner", 20), rows_of("swa", "ner", 8)], epoch_size=epoch_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_whose_workers_live_on_sees_every_epoch(workers):
    made = mixture()
    loader = torch.utils.data.DataLoader(
        made.train, batch_size=5, collate_fn=texts, num_workers=workers, persistent_workers=workers > 0
    )  # fmt: skip
    for epoch in (0, 1, 3):
        made.train.set_epoch(epoch)
        assert list(chain.from_iterable(loader)) == made.epoch(epoch)["text"][:]


def _report(epoch: SharedEpoch, questions: Any, answers: Any) -> None:
    while questions.get():
        answers.put(epoch.value)


def test_spawned_processes_share_the_epoch_and_copies_do_not():
    context = multiprocessing.get_context("spawn")
    epoch, questions, answers = SharedEpoch(2), context.Queue(), context.Queue()
    process = context.Process(target=_report, args=(epoch, questions, answers), daemon=True)
    process.start()
    for value in (2, 7):
        epoch.value = value
        questions.put(True)
        assert answers.get(timeout=60) == value
    questions.put(False)
    process.join(60)
    others = [copy.deepcopy(epoch), pickle.loads(pickle.dumps(epoch))]
    epoch.value = 9
    assert [other.value for other in others] == [7, 7]


def test_accelerate_sets_the_epoch():
    accelerate = pytest.importorskip("accelerate")
    made = mixture()
    loader = accelerate.Accelerator(cpu=True).prepare(
        torch.utils.data.DataLoader(made.train, batch_size=4, collate_fn=texts)
    )
    for epoch in range(3):
        assert list(chain.from_iterable(loader)) == made.epoch(epoch)["text"][:]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x: Any) -> dict[str, Any]:
        return {"loss": self.linear(x).pow(2).mean()}


def train(folder: Path, stop: int | None = None, resume: str | None = None) -> list[list[str]]:
    """The batches of a run of 3 epochs of 3 steps."""
    transformers = pytest.importorskip("transformers")
    made, seen = mixture(), []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append(texts(rows))
        return {"x": torch.zeros(len(rows), 1)}

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                control.should_save = control.should_training_stop = True

    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=3, per_device_train_batch_size=4, save_strategy="no", use_cpu=True,
        report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        Model(),
        arguments,
        train_dataset=made.train,
        data_collator=collate,
        callbacks=[made.callback(), Stop()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return seen


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_trainer_sees_the_rows_it_would_have_seen(tmp_path, stop):
    whole = train(tmp_path / "whole")
    for epoch in range(3):
        batches = whole[3 * epoch : 3 * epoch + 3]
        assert sorted(chain.from_iterable(batches)) == sorted(mixture().epoch(epoch)["text"][:])
    train(tmp_path / "part", stop=stop)
    resumed = train(tmp_path / "part", resume=str(tmp_path / f"part/checkpoint-{stop}"))
    assert resumed == whole[stop:]
