"""Headed models under FlixTrainer: losses by feature, masks that resume, and the ways to save memory and time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, set_seed

from flix.backends.torch import adapt
from flix.core.errors import RoutingError
from flix.tasks import DataError, TaskCollator, load_base, load_tokenizer, make_task, train_heads
from flix.tasks.task import IGNORED
from flix.transformers import FlixCollator, FlixTrainer
from tests.helpers.tasks import HEADED_ROWS, config_of, headed_tasks, shaken


def trainer_of(folder: Path, output: Path, rows: Any = HEADED_ROWS, **settings: Any) -> Any:
    tokenizer = load_tokenizer(str(folder))
    tasks = headed_tasks(tokenizer)
    set_seed(0)
    config = config_of()
    model = train_heads(adapt(load_base(str(folder), tasks), config))
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 3, "learning_rate": 0.02, "save_steps": 3, "logging_steps": 1,
        "report_to": [], "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True, **settings,
    }  # fmt: skip
    return FlixTrainer(
        model=model,
        args=TrainingArguments(str(output), **arguments),
        data_collator=FlixCollator(config, TaskCollator(tasks, tokenizer, seed=5)),
        train_dataset=rows,
        eval_dataset=rows,
    )


@pytest.fixture
def bert(encoders: dict[str, Path]) -> Path:
    return encoders["bert"]


def values(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_losses_by_feature_are_those_of_their_rows(bert: Path, tmp_path: Path) -> None:
    trainer = trainer_of(bert, tmp_path, per_device_eval_batch_size=4)
    shaken(trainer.model)
    found = trainer.evaluate()
    inner = trainer.data_collator.evaluation()
    trainer.model.eval()
    with torch.no_grad():
        losses = [float(trainer.model(**inner([row])).loss) for row in HEADED_ROWS]
    for column in ("language", "task"):
        for name in {row[column] for row in HEADED_ROWS}:
            own = [loss for row, loss in zip(HEADED_ROWS, losses, strict=True) if row[column] == name]  # fmt: skip
            said = found[f"eval_loss/{column}={name}"]
            assert said == pytest.approx(sum(own) / len(own), rel=1e-4)
    assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_trainer_predicts(bert: Path, tmp_path: Path) -> None:
    trainer = trainer_of(bert, tmp_path, per_device_eval_batch_size=2)
    found = trainer.predict(HEADED_ROWS)
    losses, counts, logits, predicted = found.predictions
    assert losses.shape == counts.shape == (7,) and len(logits) == len(predicted) == 7
    assert found.metrics["test_loss"] == pytest.approx(float(losses.mean()), rel=1e-4)


def test_a_resumed_run_masks_and_learns_alike(bert: Path, tmp_path: Path) -> None:
    whole = trainer_of(bert, tmp_path / "whole")
    first = values(whole.model)
    whole.train()
    parts = trainer_of(bert, tmp_path / "parts")
    parts.train()
    resumed = trainer_of(bert, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for trainer in (parts, resumed):
        for name, value in values(trainer.model).items():
            assert torch.equal(value, values(whole.model)[name]), name
    losses = [e["loss"] for e in whole.state.log_history if "loss" in e]
    assert losses == [e["loss"] for e in resumed.state.log_history if "loss" in e]
    assert "loss/task=text" in {key for e in whole.state.log_history for key in e}
    # Heads trained, and so did features of every task.
    moved = {n for n, value in values(whole.model).items() if not torch.equal(value, first[n])}
    assert {"classifier.ner.weight", "classifier.topic.bias", "classifier.rate.weight"} <= moved
    assert {f"flix_bank.task:{t}" for t in ("ner", "topic", "rate", "text")} <= moved


def test_texts_are_masked_by_seed_and_place(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    tasks, config = headed_tasks(tokenizer), config_of()
    row = {"text": "maji na moto kwa gari moja " * 4, "flix_task": 3, "task": "text", "language": "swa"}  # fmt: skip
    collate = FlixCollator(config, TaskCollator(tasks, tokenizer, seed=1))
    assert collate.needs_numbers and not collate.evaluation().needs_numbers
    at = {(s, r): collate([row], step=s, first_row=r) for s in range(3) for r in range(3)}
    seen = {tuple(batch["input_ids"][0].tolist()) for batch in at.values()}
    assert len(seen) == 9
    # In a batch of several rows, with rows that are numbered beforehand, and after a copy: alike.
    both = collate([HEADED_ROWS[1], row], step=2)
    assert torch.equal(both["labels"][1, : at[2, 1]["labels"].shape[1]], at[2, 1]["labels"][0])
    numbered = copy.deepcopy(collate)([{**row, "flix_row": (2, 1)}])
    assert torch.equal(numbered["input_ids"], at[2, 1]["input_ids"])
    other = FlixCollator(config, TaskCollator(tasks, tokenizer, seed=2))([row], step=2, first_row=1)  # fmt: skip
    assert not torch.equal(other["labels"], at[2, 1]["labels"])
    # In evaluation by the text alone.
    still = collate.evaluation()
    one, two = still([row]), still([HEADED_ROWS[5], row])
    assert torch.equal(two["labels"][1, : one["labels"].shape[1]], one["labels"][0])
    with pytest.raises(
        RoutingError, match="does not carry its place in the run, which what is masked is keyed by"
    ):
        collate([row])
    with pytest.raises(DataError, match="a text is masked by its place in the run"):
        TaskCollator(tasks, tokenizer)([row])
    # Without masked tasks nobody needs numbers.
    assert not FlixCollator(config, TaskCollator(tasks[:3], tokenizer)).needs_numbers


def test_masks_are_as_many_and_of_the_kinds_that_berts_are(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    task = headed_tasks(tokenizer)[3]
    read = task.read({"text": "gada maji na moto kwa gari moja sana " * 3})
    ids, able = torch.tensor(read["input_ids"]), torch.tensor(read["maskable"])
    assert able.sum() == len(ids) - 2
    chosen = masks = kept = total = 0
    for step in range(300):
        found = task.masked(read, (0, step, 0))
        new, labels = torch.tensor(found["input_ids"]), torch.tensor(found["labels"])
        on = labels != IGNORED
        assert not (on & ~able).any() and torch.equal(labels[on], ids[on])
        assert torch.equal(new[~on], ids[~on])
        total += int(able.sum())
        chosen += int(on.sum())
        masks += int((new[on] == 4).sum())
        kept += int((new[on] == ids[on]).sum())
    assert chosen / total == pytest.approx(0.15, abs=0.01)
    assert masks / chosen == pytest.approx(0.8, abs=0.03)
    # One in ten stays, and of those that are drawn anew one in 59 is what it was.
    assert kept / chosen == pytest.approx(0.1, abs=0.02)
    short = task.read({"text": "a"})
    for step in range(20):
        assert sum(label != IGNORED for label in task.masked(short, (0, step, 0))["labels"]) == 1


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}]
)
def test_what_saves_memory_changes_nothing(
    bert: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    rows = HEADED_ROWS[:6]  # whole batches
    plain = trainer_of(bert, tmp_path / "a", rows, max_steps=2, per_device_train_batch_size=6)
    size = 3 if "gradient_accumulation_steps" in settings else 6
    other = trainer_of(bert, tmp_path / "b", rows, max_steps=2, per_device_train_batch_size=size, **settings)  # fmt: skip
    if size == 3:  # the places of rows in the run are others, and so are the masks
        inner = plain.data_collator.collator, other.data_collator.collator
        for collator in inner:
            collator.trains = False
    plain.train(), other.train()
    for name, value in values(plain.model).items():
        assert torch.allclose(value, values(other.model)[name], atol=1e-4), name


def test_autocast_and_half_precision(bert: Path, tmp_path: Path) -> None:
    trainer = trainer_of(bert, tmp_path, bf16=True, max_steps=2)
    trainer.train()
    assert all(torch.isfinite(value).all() for value in values(trainer.model).values())
    tokenizer = load_tokenizer(str(bert))
    tasks = headed_tasks(tokenizer)
    torch.manual_seed(0)
    half = train_heads(adapt(load_base(str(bert), tasks, "bfloat16"), config_of()))
    torch.manual_seed(0)
    full = train_heads(adapt(load_base(str(bert), tasks), config_of()))
    assert half.encoder.dtype == torch.bfloat16
    assert half.classifier["ner"].weight.dtype == torch.float32
    collate = FlixCollator(config_of(), TaskCollator(tasks, tokenizer).evaluation())
    batch = collate(HEADED_ROWS)
    one, two = half(**batch), full(**batch)
    assert one.loss.dtype == torch.float32
    assert torch.allclose(one.row_losses, two.row_losses, rtol=0.15, atol=0.05)
    one.loss.backward()


def test_the_columns_of_tasks_survive_pruning(bert: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{key: row.get(key) for key in {k for r in HEADED_ROWS for k in r} - {"target"}} for row in HEADED_ROWS if row["flix_task"] in (0, 3)]  # fmt: skip
    data = Dataset.from_list([{**row, "other": 1} for row in rows])
    trainer = trainer_of(bert, tmp_path, data, remove_unused_columns=True, max_steps=2)
    trainer.train()
    tokenizer = load_tokenizer(str(bert))
    task = make_task("regression", tokenizer, name="x", prompt="{{{text}}} {language} {more}")
    assert {*task.reads} == {"source", "target", "text", "language", "more"}
    trained = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    plain = trainer_of(bert, tmp_path / "plain", rows, max_steps=2)
    plain.train()
    assert trained == [e["loss"] for e in plain.state.log_history if "loss" in e]


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    tasks = headed_tasks(tokenizer)
    torch.manual_seed(0)
    model = train_heads(shaken(adapt(load_base(str(bert), tasks), config_of())))
    collate = FlixCollator(config_of(), TaskCollator(tasks, tokenizer).evaluation())
    batch = collate(HEADED_ROWS[1:6])  # no row for the first head
    expected = model(**batch)
    expected.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**batch)
    found.loss.backward()
    assert torch.allclose(found.row_losses, expected.row_losses, atol=1e-4)
    for field in ("logits", "predicted", "row_counts"):
        assert torch.allclose(getattr(found, field).float(), getattr(expected, field).float(), atol=1e-4)  # fmt: skip
    for name, parameter in model.named_parameters():
        if not name.startswith("flix_bank"):
            assert (parameter.grad is None) == (name not in gradients), name
        if name in gradients:
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-4), name
