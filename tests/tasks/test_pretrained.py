"""Base and adapter in one call, and what is said where the base is gone, another, or not named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import flix
from flix.backends.torch import adapt, save
from flix.tasks import (
    ModelError,
    TaskCollator,
    answers,
    load_base,
    load_pretrained,
    load_tokenizer,
    make_task,
    tasks_of,
    tokenizer_of,
    train_heads,
)
from tests.helpers.tasks import HEADED_ROWS, collator_of, config_of, headed_tasks, shaken


def recipe(folder: Path, model: Path, tasks: list[Any]) -> None:
    described = [{**task.described(), "features": {}} for task in tasks]
    said = {"format": 1, "model": str(model), "tokenizer": None, "tasks": described}
    (folder / "recipe.json").write_text(json.dumps(said), encoding="utf-8")


@pytest.fixture
def t5(writers: dict[str, Path], tmp_path: Path) -> tuple[Path, Path, Any]:
    """A base of its own, an adapter on it, and the model that was saved."""
    base = shutil.copytree(writers["t5"], tmp_path / "base")
    task = make_task("seq2seq", load_tokenizer(str(base)), name="ner")
    model = shaken(adapt(load_base(str(base), [task]), config_of())).eval()
    save(model, tmp_path / "adapter")
    return base, tmp_path / "adapter", model


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 11).reshape(2, 4)
    routing = config_of().registry.encode([{"language": "hau"}, {"task": "ner"}])
    with torch.no_grad():
        return model(input_ids=ids, labels=ids, flix_features=routing).logits  # type: ignore[no-any-return]


def test_an_adapter_brings_its_base(t5: tuple[Path, Path, Any]) -> None:
    _base, folder, model = t5
    found = load_pretrained(folder)
    assert not found.training and isinstance(found, tf.T5ForConditionalGeneration)
    assert torch.equal(logits(found), logits(model))
    assert load_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert tokenizer_of(folder)("ab").input_ids == [100, 101, 1]


def test_a_base_that_moved_is_named(t5: tuple[Path, Path, Any], tmp_path: Path) -> None:
    base, folder, model = t5
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"base of .*adapter' is not where it was: no model folder .*base= says"):  # fmt: skip
        load_pretrained(folder)
    with pytest.raises(ModelError, match="is not where it was"):
        tokenizer_of(folder)
    with pytest.raises(ModelError, match="no model folder"):
        load_pretrained(folder, base=tmp_path / "nowhere")
    found = load_pretrained(folder, base=tmp_path / "elsewhere")
    assert torch.equal(logits(found), logits(model))
    assert tokenizer_of(folder, base=tmp_path / "elsewhere")("a").input_ids == [100, 1]


def test_a_runs_own_tokenizer_stays_beside_a_base_that_moved(t5: tuple[Path, Path, Any], tmp_path: Path) -> None:  # fmt: skip
    base, folder, _model = t5
    own = tf.ByT5Tokenizer(extra_ids=7)
    own.save_pretrained(tmp_path / "own")
    recipe(folder, base, [make_task("seq2seq", own, name="ner")])
    said = json.loads((folder / "recipe.json").read_text())
    said["tokenizer"] = str(tmp_path / "own")
    (folder / "recipe.json").write_text(json.dumps(said))
    assert len(tokenizer_of(folder)) == len(own)
    base.rename(tmp_path / "elsewhere")
    assert len(tokenizer_of(folder, base=tmp_path / "elsewhere")) == len(own)
    (tmp_path / "own").rename(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"the tokenizer that .*recipe.json' names is not there: .*save it into the adapter's folder"):  # fmt: skip
        tokenizer_of(folder, base=tmp_path / "elsewhere")
    said["tasks"][0]["kind"] = "seq3seq"
    (folder / "recipe.json").write_text(json.dumps(said))
    with pytest.raises(flix.AdapterError, match=r"recipe.json: not a recipe of an adapter: task 'ner': no kind 'seq3seq'"):  # fmt: skip
        tasks_of(folder, own)


def test_another_base_is_refused(t5: tuple[Path, Path, Any], writers: dict[str, Path]) -> None:
    base, folder, _model = t5
    other = tf.T5ForConditionalGeneration(tf.T5Config.from_pretrained(base))
    other.save_pretrained(base)
    with pytest.raises(flix.AdapterError, match=r"was trained on .*the kernels that it adapts have other values.*base="):  # fmt: skip
        load_pretrained(folder)
    with pytest.raises(flix.AdapterError, match="another architecture"):
        load_pretrained(folder, base=writers["llama"])


def test_files_that_name_no_base_are_refused(writers: dict[str, Path], tmp_path: Path) -> None:
    model = adapt(tf.T5ForConditionalGeneration(tf.T5Config.from_pretrained(writers["t5"])), config_of())  # fmt: skip
    model.config.name_or_path = ""
    save(model, tmp_path)
    for ask in (load_pretrained, tokenizer_of):
        with pytest.raises(flix.AdapterError, match=r"does not name the base .*base="):
            ask(tmp_path)
    with pytest.raises(flix.AdapterError, match="have other values"):
        load_pretrained(tmp_path, base=writers["t5"])
    with pytest.raises(flix.AdapterError, match="is not an adapter"):
        load_pretrained(writers["t5"])


def test_a_head_of_another_class_is_asked_for(encoders: dict[str, Path], tmp_path: Path) -> None:
    maker = tf.AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = adapt(
        maker.from_pretrained(encoders["bert"], num_labels=3),
        config_of(exclude_modules=["pooler.dense"]),
    )
    model.classifier.requires_grad_(True)
    save(model, tmp_path)
    with pytest.raises(
        flix.AdapterError, match=r"classifier.*names, BertForMaskedLM; model_class="
    ):
        load_pretrained(tmp_path)
    # The base's files have no pooler: what was trained on a random one is lost without it.
    with pytest.raises(flix.AdapterError, match=r"hold bert.pooler.dense.bias, bert.pooler.dense.weight, which would start"):  # fmt: skip
        load_pretrained(tmp_path, model_class=maker, num_labels=3)
    model.bert.pooler.requires_grad_(True)
    save(model, tmp_path)
    found = load_pretrained(tmp_path, model_class=maker, num_labels=3)
    ids = torch.arange(5, 13).reshape(2, 4)
    routing = config_of().registry.encode([{"language": "hau"}, {"task": "ner"}])
    model.eval()
    assert torch.equal(found(ids, flix_features=routing).logits, model(ids, flix_features=routing).logits)  # fmt: skip


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_a_recipe_brings_the_heads(
    encoders: dict[str, Path], tmp_path: Path, own_tokenizer: bool
) -> None:
    tokenizer = load_tokenizer(str(encoders["bert"]))
    tasks = headed_tasks(tokenizer, max_source=20)
    model = train_heads(shaken(adapt(load_base(str(encoders["bert"]), tasks), config_of())))
    save(model, tmp_path)
    with pytest.raises(flix.AdapterError, match=r"holds no recipe.json"):
        tasks_of(tmp_path, tokenizer)
    recipe(tmp_path, encoders["bert"], tasks)
    if own_tokenizer:
        tokenizer.save_pretrained(tmp_path)
    found = load_pretrained(tmp_path)
    served = tasks_of(tmp_path, tokenizer_of(tmp_path))
    assert served == tasks
    before = answers(model, tasks, HEADED_ROWS, collator_of(config_of(), TaskCollator(tasks, tokenizer)))  # fmt: skip
    collate = collator_of(found.flix_config, TaskCollator(served, served[0].tokenizer))
    assert answers(found, served, HEADED_ROWS, collate) == before
    model.classifier["ner"].requires_grad_(False)
    model.flix_state.heads = ()
    save(model, tmp_path)
    with pytest.raises(flix.AdapterError, match=r"hold classifier.ner.weight, classifier.ner.bias, which would start"):  # fmt: skip
        load_pretrained(tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(flix.AdapterError, match=r"recipe.json: not a recipe of an adapter"):
        load_pretrained(tmp_path)
