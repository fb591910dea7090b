"""Heads that were unfrozen are saved and loaded with the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import flix  # noqa: E402
from flix.backends.torch import adapt, load, save  # noqa: E402
from flix.backends.torch.heads import HEADS_FILE, put_heads, read_heads, save_heads, trained_heads  # noqa: E402
from tests.helpers.torch import parameters_of  # noqa: E402
from tests.helpers.transformers import classifier, config, llama  # noqa: E402

HEAD = {"classifier.weight", "classifier.bias"}


def fresh(labels: int = 3, seed: int = 1) -> Any:
    """A plain model of the classifier's architecture with other weights."""
    settings = classifier().config.to_dict()
    torch.manual_seed(seed)
    settings.update({"id2label": None, "label2id": None, "num_labels": labels})
    return transformers.BertForSequenceClassification(transformers.BertConfig(**settings))


def test_round_trip(tmp_path: Path) -> None:
    model = classifier()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
    save(model, tmp_path)
    plain = fresh()
    assert not torch.equal(plain.classifier.weight, model.classifier.weight)
    loaded = load(plain, tmp_path)
    assert set(trained_heads(loaded)) == HEAD
    for name, parameter in trained_heads(model).items():
        assert torch.equal(trained_heads(loaded)[name], parameter)
        assert trained_heads(loaded)[name].requires_grad
    pairs = {id(p) for p in parameters_of(loaded).values()}
    trainable = {n for n, p in loaded.named_parameters() if p.requires_grad and id(p) not in pairs}
    assert trainable == HEAD
    assert (tmp_path / HEADS_FILE).stat().st_mode & 0o777 == 0o644
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_heads_stay_when_they_are_frozen_later(tmp_path: Path) -> None:
    """A language is added with the head frozen: the head belongs to the adapter all the same."""
    save(classifier(), tmp_path / "one")
    model = load(fresh(), tmp_path / "one")
    model.classifier.requires_grad_(False)
    save(model, tmp_path / "two")
    one, two = (tmp_path / n / HEADS_FILE for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_without_heads_there_is_no_file(tmp_path: Path) -> None:
    save(classifier(), tmp_path)
    assert (tmp_path / HEADS_FILE).exists()
    frozen = adapt(fresh(), config())
    save(frozen, tmp_path)
    assert not (tmp_path / HEADS_FILE).exists()
    before = frozen.classifier.weight.clone()
    load(frozen, tmp_path)
    assert torch.equal(frozen.classifier.weight, before)
    assert not frozen.classifier.weight.requires_grad


def test_shared_parameters(tmp_path: Path) -> None:
    """A head tied to the embedding is one parameter, saved once, and tied after loading."""
    model = llama(target_modules=["q_proj"])
    model.lm_head.weight = model.model.embed_tokens.weight
    model.lm_head.requires_grad_(True)
    assert set(trained_heads(model)) == {"model.embed_tokens.weight"}
    save(model, tmp_path)
    other = llama(target_modules=["q_proj"])
    other.lm_head.weight = other.model.embed_tokens.weight
    with torch.no_grad():
        other.lm_head.weight.zero_()
    load(other, tmp_path)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_dtypes_are_kept(tmp_path: Path) -> None:
    model = classifier()
    model.classifier.to(torch.bfloat16)
    save_heads(model, tmp_path)
    other = classifier()
    other.classifier.to(torch.bfloat16)
    with torch.no_grad():
        other.classifier.weight.zero_()
    put_heads(other, read_heads(other, tmp_path, None))
    assert torch.equal(other.classifier.weight, model.classifier.weight)
    assert other.classifier.weight.dtype == torch.bfloat16


def test_rename(tmp_path: Path) -> None:
    """A wrapper puts a path before every layer's; heads follow it like layers."""
    model = classifier()
    save(model, tmp_path)
    outer = torch.nn.ModuleDict({"inner": fresh()})
    load(outer, tmp_path, rename=lambda path: f"inner.{path}")
    assert torch.equal(outer["inner"].classifier.weight, model.classifier.weight)


def test_mistakes(tmp_path: Path) -> None:
    save(classifier(), tmp_path)
    with pytest.raises(
        flix.AdapterError, match=r"'classifier.bias' has the shape \[3\].*has \[5\]"
    ):
        load(fresh(labels=5), tmp_path)
    other = fresh()
    other.classifer = other.classifier
    del other.classifier
    with pytest.raises(flix.AdapterError, match=r"'classifier\.(weight|bias)'.*did you mean 'classifer\."):  # fmt: skip
        load(other, tmp_path)
    # Nothing was changed before the mistake was found.
    assert "flix_state" not in vars(other) and all(p.requires_grad for p in other.parameters())
    # What is wrong with the layers is said before what is wrong with the heads.
    settings = fresh().config
    settings.hidden_size = 32
    with pytest.raises(flix.AdapterError, match=r"bert\.encoder\.layer\.0"):
        load(transformers.BertForSequenceClassification(settings), tmp_path)
    (tmp_path / HEADS_FILE).write_bytes(b"\x10\x00\x00")
    with pytest.raises(flix.AdapterError, match=r"trained.safetensors' is damaged"):
        load(fresh(), tmp_path)
    with pytest.raises(flix.TargetError):
        save_heads(fresh(), tmp_path)
