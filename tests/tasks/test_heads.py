"""One encoder with a head for each task: losses, gradients, and what is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

import flix
from flix.backends.torch import adapt, export_peft, load, merge, save
from flix.tasks import (
    HeadedModel,
    ModelError,
    TaskCollator,
    answers,
    load_base,
    load_tokenizer,
    make_task,
    train_heads,
)
from flix.tasks.task import IGNORED
from tests.helpers.tasks import HEADED_ROWS, collator_of, config_of, headed_tasks, shaken

ENCODERS = ("bert", "roberta", "distilbert")
KINDS = (*ENCODERS, "llama", "t5")


def parts(folder: Path, dtype: str = "float64", **settings: Any) -> tuple[Any, list[Any], Any]:
    """A plain model, its tasks and a collator that trains nothing."""
    tokenizer = load_tokenizer(str(folder))
    tasks = headed_tasks(tokenizer, masked=tokenizer.mask_token is not None, **settings)
    torch.manual_seed(1)
    model = load_base(str(folder), tasks, dtype)
    return model.to(getattr(torch, dtype)), tasks, TaskCollator(tasks, tokenizer).evaluation()


def rows_for(tasks: list[Any]) -> list[dict[str, Any]]:
    return [row for row in HEADED_ROWS if row["flix_task"] < len(tasks)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_mixed_batch_is_the_mean_of_its_rows_alone(
    encoders: dict[str, Path], kind: str
) -> None:
    model, tasks, collate = parts(encoders[kind])
    rows = rows_for(tasks)
    out = model(**collate(rows))
    alone = [model(**collate([row])) for row in rows]
    for place, single in enumerate(alone):
        assert float(out.row_losses[place]) == pytest.approx(float(single.loss), rel=1e-5)
    assert float(out.loss) == pytest.approx(
        sum(float(single.loss) for single in alone) / len(rows), rel=1e-5
    )
    assert out.row_counts.tolist() == [1.0] * len(rows)
    assert out["loss"] is out.loss
    # What each row's own labels are worth, computed beside the model.
    batch = collate(rows)
    for place, row in enumerate(rows):
        task, logits = tasks[row["flix_task"]], out.logits[place]
        if task.kind == "masked":
            continue
        if task.kind == "regression":
            expected = (logits[0, 0] - row["target"]) ** 2
        else:
            labels = batch["labels"][place]
            kept = labels != IGNORED
            assert kept.sum() == (len(row["tokens"]) if task.kind == "tagging" else 1)
            expected = F.cross_entropy(logits[kept][:, : len(task.labels)], labels[kept])
        assert float(out.row_losses[place]) == pytest.approx(float(expected), rel=1e-6)


def test_heads_read_the_mean_of_a_row_or_a_decoders_last_token(encoders: dict[str, Path]) -> None:
    for kind in ("bert", "llama", "t5"):
        model, _tasks, collate = parts(encoders[kind])
        batch = collate(HEADED_ROWS[1:3])
        encoded = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states = model.encoder(**encoded).last_hidden_state
        out = model(**batch)
        for row in range(2):
            own = states[row][batch["attention_mask"][row].bool()]
            pooled = own[-1] if kind == "llama" else own.mean(0)
            expected = model.classifier["topic"](pooled)
            assert torch.allclose(out.logits[row, 0, :2], expected.float(), atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_tagging_has_transformers_own_loss(encoders: dict[str, Path], kind: str) -> None:
    model, _tasks, collate = parts(encoders[kind])
    config = copy.deepcopy(model.config)
    config.num_labels = 4
    theirs = tf.AutoModelForTokenClassification.from_config(config).double()
    getattr(theirs, theirs.base_model_prefix).load_state_dict(model.encoder.state_dict())
    theirs.classifier.load_state_dict(model.classifier["ner"].state_dict())
    theirs.eval(), model.eval()
    for rows in ([HEADED_ROWS[0]], [HEADED_ROWS[6], HEADED_ROWS[6] | {"tokens": ["xyz", "ba"]}]):
        batch = collate(rows)  # rows of as many labels: the mean over rows is the mean over labels
        labels = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        assert float(model(**batch).loss) == pytest.approx(float(theirs(**labels).loss), rel=1e-6)


def test_classification_has_transformers_own_loss(encoders: dict[str, Path]) -> None:
    model, _tasks, collate = parts(encoders["llama"])
    config = copy.deepcopy(model.config)
    config.num_labels = 2
    theirs = tf.AutoModelForSequenceClassification.from_config(config).double()
    theirs.model.load_state_dict(model.encoder.state_dict())
    theirs.score.load_state_dict({"weight": model.classifier["topic"].weight})
    theirs.eval(), model.eval()
    batch = collate(HEADED_ROWS[1:3])
    expected = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"][:, 0]).loss  # fmt: skip
    assert float(model(**batch).loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ENCODERS)
def test_masked_texts_have_transformers_own_loss(encoders: dict[str, Path], kind: str) -> None:
    model, _tasks, collate = parts(encoders[kind])
    theirs = tf.AutoModelForMaskedLM.from_pretrained(encoders[kind], dtype=torch.float64).eval()
    batch = collate([HEADED_ROWS[5]])
    model.eval()
    labels = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    ours, expected = model(**batch), theirs(**labels)
    assert float(ours.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    kept = batch["labels"] != IGNORED
    assert kept.any() and torch.equal(ours.predicted[kept], expected.logits.argmax(-1)[kept])
    assert (ours.predicted[~kept] == IGNORED).all()
    # No part of the base's head is a copy: what is tied stays tied.
    embedding = model.get_input_embeddings().weight
    assert any(p is embedding for p in model.lm_head.parameters())
    assert [*model.classifier] == ["ner", "topic", "rate"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_heads_of_the_batch_get_gradients(encoders: dict[str, Path], kind: str) -> None:
    plain, tasks, collate = parts(encoders[kind])
    config = config_of()
    model = train_heads(shaken(adapt(plain, config)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {f"classifier.{n}.{p}" for n in ("ner", "topic", "rate") for p in ("weight", "bias")}
    assert {name for name in trained if not name.startswith("flix_bank")} == heads
    batch = collator_of(config, collate)(HEADED_ROWS[1:4])
    model(**batch).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient >= {"classifier.topic.weight", "classifier.rate.bias"}
    assert "classifier.ner.weight" not in with_gradient
    # The whole batch's gradients are those of its rows, added up.
    rows = rows_for(tasks)
    model.zero_grad()
    model(**collator_of(config, collate)(rows)).loss.backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row in rows:
        (model(**collator_of(config, collate)([row])).loss / len(rows)).backward()
    assert whole.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(whole[name], parameter.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_answers_alike_on_a_fresh_model(
    encoders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    plain, tasks, collate = parts(encoders[kind], "float32")
    config = config_of()
    model = train_heads(shaken(adapt(plain, config)))
    rows = rows_for(tasks)
    before = answers(model, tasks, rows, collator_of(config, collate), batch_size=3)
    save(model, tmp_path / "adapter")
    torch.manual_seed(99)
    fresh = load(load_base(str(encoders[kind]), tasks), tmp_path / "adapter")
    assert answers(fresh, tasks, rows, collator_of(config, collate), batch_size=3) == before
    other = answers(load_base_adapted(encoders[kind], tasks, config), tasks, rows, collator_of(config, collate))  # fmt: skip
    assert other != before
    held = flix.load_adapter(tmp_path / "adapter")
    assert {*held.heads} == {f"classifier.{n}.{p}" for n in ("ner", "topic", "rate") for p in ("weight", "bias")}  # fmt: skip
    assert held.base is not None and str(encoders[kind]) in str(held.base)


def load_base_adapted(folder: Path, tasks: list[Any], config: flix.FlixConfig) -> Any:
    torch.manual_seed(99)
    return adapt(load_base(str(folder), tasks), config)


def test_a_merged_model_answers_as_its_composition(encoders: dict[str, Path]) -> None:
    plain, _tasks, collate = parts(encoders["bert"])
    config = config_of()
    model = train_heads(shaken(adapt(plain, config))).eval()
    rows = [{**row, "language": "hau", "task": "ner"} for row in HEADED_ROWS]
    routed = model(**collator_of(config, collate)(rows))
    merged = merge(model, {"language": "hau", "task": "ner"})
    assert type(merged) is HeadedModel
    plain_out = merged(**collate(rows))
    assert torch.allclose(routed.row_losses, plain_out.row_losses, rtol=1e-5)
    assert torch.equal(routed.predicted, plain_out.predicted)


def test_a_lora_of_one_composition_brings_each_head(
    encoders: dict[str, Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    plain, tasks, collate = parts(encoders["bert"], "float32")
    model = train_heads(shaken(adapt(plain, config_of()))).eval()
    row = {"language": "hau", "task": "ner"}
    export_peft(model, row, tmp_path / "lora")
    said = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert said["modules_to_save"] == ["classifier.ner", "classifier.topic", "classifier.rate"]
    torch.manual_seed(7)
    loaded = peft.PeftModel.from_pretrained(load_base(str(encoders["bert"]), tasks), tmp_path / "lora")  # fmt: skip
    rows = [{**given, **row} for given in HEADED_ROWS]
    routed = model(**collator_of(config_of(), collate)(rows))
    assert torch.allclose(loaded.eval()(**collate(rows)).row_losses, routed.row_losses, atol=1e-5)


@pytest.mark.parametrize("command", ["merge", "export"])
def test_commands_refuse_what_no_file_holds(
    encoders: dict[str, Path], tmp_path: Path, command: str
) -> None:
    from typer.testing import CliRunner

    from flix.cli.app import app

    plain, tasks, _collate = parts(encoders["bert"], "float32")
    save(train_heads(adapt(plain, config_of())), tmp_path / "a")
    described = [task.described() for task in tasks]
    said = {"format": 1, "model": str(encoders["bert"]), "tokenizer": None, "tasks": described}
    (tmp_path / "a" / "recipe.json").write_text(json.dumps(said))
    arguments = [command, str(tmp_path / "a"), "--base", str(encoders["bert"]), "--features", "task=ner"]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "answers with heads of its own, for ner, topic, rate, text" in result.stderr


def test_an_adapted_head_is_refused_by_name(encoders: dict[str, Path]) -> None:
    for targets, path, row in (
        (["query", "topic"], "classifier.topic", 1),
        (["query", "dense"], r"lm_head\.cls\.predictions\.transform\.dense", 5),
    ):
        plain, _tasks, collate = parts(encoders["bert"])
        config = config_of(target_modules=targets)
        model = adapt(plain, config)
        with pytest.raises(flix.TargetError, match=f"{path} belongs to a head.*exclude_modules"):
            model(**collator_of(config, collate)([HEADED_ROWS[row]]))


def test_default_targets_are_the_encoders_layers(encoders: dict[str, Path]) -> None:
    from flix.tasks import model_layers

    for kind in KINDS:
        plain, _tasks, _collate = parts(encoders[kind])
        model = adapt(plain, config_of())
        layers = {*flix.backends.torch.to_adapter(model).layers}  # type: ignore[attr-defined]
        assert layers and all(path.startswith("encoder.") for path in layers)
        assert not any("pooler" in path for path in layers)
        # What a plan counts without weights.
        planned = model_layers(str(encoders[kind]), "tagging", "all-linear", [])
        assert {*planned} == layers


def test_batches_without_labels_have_no_loss(encoders: dict[str, Path]) -> None:
    model, _tasks, collate = parts(encoders["bert"])
    asked = {k: v for k, v in collate.prompts()(HEADED_ROWS[:2]).items() if k != "labels"}
    out = model(**asked)
    assert out.loss is None and "loss" not in out and out.row_counts.tolist() == [0.0, 0.0]
    # Rows that have nothing to learn count for nothing.
    empty = {"tokens": [], "tags": [], "flix_task": 0}
    alone, both = model(**collate([HEADED_ROWS[1]])), model(**collate([HEADED_ROWS[1], empty]))
    assert both.row_counts.tolist() == [1.0, 0.0]
    assert float(both.loss) == pytest.approx(float(alone.loss), rel=1e-5)
    nothing = model(**collate([empty]))
    nothing.loss.backward()
    assert float(nothing.loss) == 0.0
    blank = {"text": "", "flix_task": 3}
    assert float(model(**collate([blank])).loss) == 0.0
    assert float(model(**collate([{**HEADED_ROWS[1], "text": ""}])).loss) > 0.0


def test_a_single_task_needs_no_numbers(encoders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(encoders["bert"]))
    task = make_task("classification", tokenizer, name="keys.items", labels=["a", "b"])
    model = load_base(str(encoders["bert"]), [task])
    batch = TaskCollator([task], tokenizer)([{"source": "ga", "target": "b"}])
    batch.pop("head")
    assert model(**batch).loss > 0 and [*model.classifier] == ["keys_items"]
    # Names that modules cannot have, each once.
    tasks = [make_task("classification", tokenizer, name=n, labels=["a"]) for n in ("keys", "a.b", "a_b")]  # fmt: skip
    model = load_base(str(encoders["bert"]), tasks)
    assert [*model.classifier] == ["keys_", "a_b", "a_b_"]


def test_bases_that_cannot_do_a_task_are_refused(encoders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(encoders["bert"]))
    task = make_task("masked", tokenizer, name="text")
    with pytest.raises(ModelError, match=r"\(llama\) has no head that fills masks"):
        load_base(str(encoders["llama"]), [task])
    with pytest.raises(ModelError, match=r"the base model .* cannot be loaded"):
        load_base(str(encoders["llama"].parent), headed_tasks(tokenizer))
    other = make_task("classification", tokenizer, name="text", labels=["a", "b"])
    with pytest.raises(flix.ConfigError, match="called 'text' share a head, but have different kinds or labels: masked, and classification of a, b"):  # fmt: skip
        load_base(str(encoders["bert"]), [task, other])
    seq2seq = make_task("seq2seq", tokenizer, name="x")
    with pytest.raises(flix.ConfigError, match="seq2seq and masked cannot be combined"):
        load_base(str(encoders["bert"]), [task, seq2seq])


def test_a_head_that_the_bases_files_lack_trains(encoders: dict[str, Path], tmp_path: Path) -> None:
    tf.AutoModel.from_pretrained(encoders["bert"]).save_pretrained(tmp_path)
    load_tokenizer(str(encoders["bert"])).save_pretrained(tmp_path)
    tasks = headed_tasks(load_tokenizer(str(tmp_path)))
    model = train_heads(adapt(load_base(str(tmp_path), tasks), config_of()))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("lm_head")}  # fmt: skip
    assert "lm_head.cls.predictions.transform.dense.weight" in trained
    embedding = model.get_input_embeddings().weight
    assert not embedding.requires_grad


def test_tasks_of_one_name_share_a_head(encoders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(str(encoders["bert"]))
    tasks = headed_tasks(tokenizer)
    text = make_task("classification", tokenizer, name="topic", columns={"source": "body", "target": "kind"}, labels=tasks[1].labels)  # fmt: skip
    model = load_base(str(encoders["bert"]), [text, *tasks])
    assert [*model.classifier] == ["topic", "ner", "rate"]
    collate = TaskCollator([text, *tasks], tokenizer).evaluation()
    rows = [{**row, "flix_task": row["flix_task"] + 1} for row in HEADED_ROWS]
    rows.append({"body": rows[1]["text"], "kind": rows[1]["target"], "flix_task": 0})
    batch = collate(rows)
    assert batch["head"].tolist() == [1, 0, 0, 2, 2, 3, 1, 0]
    losses = model(**batch).row_losses.tolist()
    assert losses[-1] == pytest.approx(losses[1], rel=1e-5) and losses[-1] != losses[2]
    config = config_of()
    adapted = adapt(model, config)
    rows[-1] |= {"language": "swa", "task": "topic"}
    found = answers(adapted, [text, *tasks], rows, collator_of(config, collate))
    assert found[-1].output == found[1].output and found[-1].source == found[1].source
    assert found[0].detail["tags"] and found[5].detail["masked"]
