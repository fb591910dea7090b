"""Heads that were unfrozen are saved and loaded with the adapter."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import flix  # noqa: E402
from flix.backends.torch import adapt, load, save  # noqa: E402
from flix.backends.torch.heads import as_tensor, head_places, heads, put_heads, trained_heads  # noqa: E402
from flix.core.adapter.adapter import LayerShape  # noqa: E402
from flix.core.adapter.described import Head  # noqa: E402
from tests.helpers.heads import check_every_stop, fingerprint_of  # noqa: E402
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
    assert {p.name for p in tmp_path.iterdir()} == {"flix.safetensors", "flix_config.json"}


def test_heads_stay_when_they_are_frozen_later(tmp_path: Path) -> None:
    """A language is added with the head frozen: the head belongs to the adapter all the same."""
    save(classifier(), tmp_path / "one")
    model = load(fresh(), tmp_path / "one")
    model.classifier.requires_grad_(False)
    save(model, tmp_path / "two")
    one, two = (flix.load_adapter(tmp_path / n).heads for n in ("one", "two"))
    assert {*one} == {*two} == HEAD
    assert all(np.array_equal(one[n].values, two[n].values) for n in HEAD)


def test_another_models_heads_do_not_stay_in_the_folder(tmp_path: Path) -> None:
    save(classifier(), tmp_path)
    (tmp_path / "trained.safetensors").write_bytes(b"of version 1")
    frozen = adapt(fresh(), config())
    save(frozen, tmp_path)
    assert not (tmp_path / "trained.safetensors").exists()
    assert flix.load_adapter(tmp_path).heads == {}
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
    model.classifier.bias = torch.nn.Parameter(model.classifier.bias.detach().half())
    save(model, tmp_path)
    found = flix.load_adapter(tmp_path).heads
    assert {n: h.dtype for n, h in found.items()} == {"classifier.weight": "BF16", "classifier.bias": "F16"}  # fmt: skip
    assert torch.equal(as_tensor(found["classifier.weight"]), model.classifier.weight)
    for dtype in (torch.bfloat16, torch.float32):
        other = classifier()
        other.classifier.to(dtype)
        with torch.no_grad():
            other.classifier.weight.zero_()
        load(other, tmp_path)
        assert torch.equal(other.classifier.weight, model.classifier.weight.to(dtype))
        assert other.classifier.weight.dtype == dtype


def test_heads_whose_dtype_files_do_not_have_are_named(tmp_path: Path) -> None:
    model = classifier()
    model.classifier.bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(flix.AdapterError, match=r"'classifier\.bias' is not float16, bfloat16"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())


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
        flix.AdapterError, match=r"'classifier\.weight' has the shape \[3, 16\].*has \[5, 16\]"
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
    with pytest.raises(flix.TargetError):
        heads(fresh())
    assert set(trained_heads(load(fresh(labels=5), tmp_path, heads=False))) == set()


def test_a_head_is_no_adapted_kernel_under_any_name(tmp_path: Path) -> None:
    """Written by a stranger, or unfrozen by mistake; a tied kernel has several names."""
    model = llama(target_modules=["embed_tokens"])
    model.lm_head.weight = model.model.embed_tokens.weight
    save(model, tmp_path)
    model.lm_head.requires_grad_(True)
    with pytest.raises(flix.AdapterError, match=r"kernel of the adapted layer 'model.embed_tokens'"):  # fmt: skip
        save(model, tmp_path)
    found = flix.load_adapter(tmp_path)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        head = Head("F32", np.zeros(tuple(model.lm_head.weight.shape), "f4"))
        flix.save_adapter(replace(found, heads={name: head}), tmp_path)
        plain = llama(target_modules=["q_proj"])
        plain = flix.backends.torch.share_base(plain)  # a plain one
        plain.lm_head.weight = plain.model.embed_tokens.weight
        before = plain.lm_head.weight.clone()
        with pytest.raises(flix.AdapterError, match=f"'{name}' is the kernel of the adapted layer"):
            load(plain, tmp_path)
        assert torch.equal(plain.lm_head.weight, before)


def test_heads_can_be_named(tmp_path: Path) -> None:
    model = classifier()
    model.classifier.requires_grad_(False)
    save(model, tmp_path, heads=["classifier.bias", "bert.embeddings.LayerNorm"])
    named = {"classifier.bias", *(f"bert.embeddings.LayerNorm.{n}" for n in ("weight", "bias"))}
    assert set(flix.load_adapter(tmp_path).heads) == named
    save(model, tmp_path)  # and are remembered
    assert set(flix.load_adapter(tmp_path).heads) == named


def test_a_layer_norm_is_no_kernel() -> None:
    model = classifier()
    places = head_places(model)
    assert places["bert.embeddings.LayerNorm.weight"].kernel_of == ()
    assert list(places["classifier.weight"].kernel_of) == ["classifier"]
    assert not any(name.startswith("flix_bank") for name in places)


def test_every_stop_of_a_save_leaves_one_version(tmp_path: Path) -> None:
    models = []
    for value in (1.0, 2.0):
        model = classifier()
        with torch.no_grad():
            for parameter in (*parameters_of(model).values(), *trained_heads(model).values()):
                parameter.fill_(value)
        models.append(model)

    def read() -> set[float]:
        model = load(fresh(), tmp_path)
        values = (*parameters_of(model).values(), *trained_heads(model).values())
        return {float(v) for p in values for v in p.detach().unique()}

    check_every_stop(tmp_path, models, lambda model: save(model, tmp_path), read)


def test_models_of_one_base_have_heads_of_their_own(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        model = classifier()
        torch.nn.init.constant_(model.classifier.weight, value)
        save(model, tmp_path / str(value))
    base = fresh()
    one = load(base, tmp_path / "1.0")
    two = load(flix.backends.torch.share_base(one), tmp_path / "2.0")
    assert one.bert.pooler.dense.weight is two.bert.pooler.dense.weight
    assert set(one.classifier.weight.unique().tolist()) == {1.0}
    assert set(two.classifier.weight.unique().tolist()) == {2.0}
    put_heads(two, flix.load_adapter(tmp_path / "1.0").heads)
    assert set(two.classifier.weight.unique().tolist()) == {1.0}


def test_the_base_is_told_and_compared(tmp_path: Path) -> None:
    model = classifier()
    model.config.name_or_path, model.config._commit_hash = "org/base", "abc"
    save(model, tmp_path)
    base = flix.load_adapter(tmp_path).base
    assert base is not None and (base.name, base.revision) == ("org/base", "abc")
    other = fresh(seed=1)
    other.load_state_dict(
        {n: p for n, p in model.state_dict().items() if not n.startswith("flix_bank")}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(copy.deepcopy(other), tmp_path)
        load(copy.deepcopy(other).to(torch.bfloat16), tmp_path)
        load(copy.deepcopy(other).half(), tmp_path)
        load(copy.deepcopy(other).to("meta"), tmp_path, heads=False)  # nobody can tell
    with pytest.warns(UserWarning, match=f"'org/base' at revision abc .*{base.fingerprint}.*loaded onto a base without"):  # fmt: skip
        load(fresh(seed=7), tmp_path)


def test_conv1d_and_embeddings_have_the_fingerprint_of_linear_maps(tmp_path: Path) -> None:
    """One kernel in torch's two orientations, and as other frameworks have it."""
    from transformers.pytorch_utils import Conv1D

    class Net(torch.nn.Module):
        def __init__(self, layer: Any, table: Any) -> None:
            super().__init__()
            self.q, self.e = layer, table

        def forward(self, x: Any) -> Any:
            return self.q(self.e(x))

    linear, conv, table = torch.nn.Linear(6, 4), Conv1D(4, 6), torch.nn.Embedding(5, 6)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
    found = set()
    for layer in (linear, conv):
        net = adapt(Net(layer, copy.deepcopy(table)), config(target_modules=["q", "e"]))
        save(net, tmp_path)
        found.add(flix.load_adapter(tmp_path).base)
    assert len(found) == 1
    shapes = {"q": LayerShape(6, 4), "e": LayerShape(5, 6, "embedding")}
    kernels = {"q": linear.weight.detach().numpy(), "e": table.weight.detach().numpy().T}
    assert found.pop().fingerprint == fingerprint_of(shapes, kernels)
