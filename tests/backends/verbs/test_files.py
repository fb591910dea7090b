"""Adapters out of models and into them."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("flix_numpy")

import flix_numpy

import flix
from flix import AdapterError, ConfigError, FeatureError
from flix.core.adapter.described import Head
from tests.helpers.example import (
    ROW,
    SWA,
    adapted,
    donor,
    folding,
    plain,
    same,
    tokens,
    values,
    verbs,
)
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import assert_close


def test_a_saved_model_loads_into_a_plain_one(tmp_path):
    model = adapted(target_modules=["embed", "k"])
    assert verbs.save(model, tmp_path / "a") is None
    other = plain()
    assert verbs.load(other, tmp_path / "a") is other
    same(values(other), values(model))
    assert other.state.config == model.state.config
    assert_close(other(tokens(), IDS, WEIGHTS), model(tokens(), IDS, WEIGHTS))


def test_a_saved_model_loads_into_an_adapted_one_of_the_same_layout(tmp_path):
    verbs.save(adapted(), tmp_path)
    other = verbs.freeze(verbs.adapt(plain(), config()), [SWA])
    assert verbs.load(other, tmp_path) is other
    same(values(other), values(adapted()))
    assert set(other.state.frozen) == {SWA}
    with pytest.raises(AdapterError, match="'embed' of the model is adapted"):
        verbs.load(verbs.adapt(plain(), config(target_modules=["embed", "q", "k"])), tmp_path)
    with pytest.raises(AdapterError, match="load_features takes over some features"):
        verbs.load(donor(), tmp_path)


def test_files_of_other_architectures_and_damaged_ones_change_nothing(tmp_path):
    verbs.save(adapted(), tmp_path)
    with pytest.raises(AdapterError, match="another architecture: layer 'k' is linear 6 -> 5"):
        verbs.load(plain(k=(6, 4), lm_head=(4, 3)), tmp_path)
    (tmp_path / "flix.safetensors").write_bytes(b"")
    model = plain()
    with pytest.raises(AdapterError, match=r"flix\.safetensors"):
        verbs.load(model, tmp_path)
    assert flix_numpy.primitives.adapted(model) is None


def test_layer_paths_of_files_are_translated(tmp_path):
    flix.save_adapter(verbs.to_adapter(adapted()).renamed({"q": "x.q", "k": "x.k"}), tmp_path)
    model = verbs.load(plain(), tmp_path, {"x.q": "q", "x.k": "k"})
    same(values(model), values(adapted()))


def test_some_features_are_saved_with_what_they_imply(tmp_path):
    verbs.save(donor(), tmp_path, {"language": "ibo"})
    found = flix.load_adapter(tmp_path)
    assert set(found.config.registry.features) == {("language", "ibo"), ("task", "mt")}
    same(values(donor()), dict(found.tensors))
    with pytest.raises(FeatureError, match="yor"):
        verbs.save(donor(), tmp_path, {"language": "yor"})


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="file"):
        verbs.save(adapted(), tmp_path / "file")


def test_strategies_of_loading_are_checked_before_anything_is_changed(tmp_path):
    verbs.save(adapted(), tmp_path)
    model = plain()
    with pytest.raises(ConfigError, match="strategy"):
        verbs.load(model, tmp_path, strategy="fast")
    with pytest.raises(ConfigError, match="the only strategy is 'auto'"):
        verbs.load(model, tmp_path, strategy="gather")
    assert flix_numpy.primitives.adapted(model) is None


def test_what_is_read_out_is_copied():
    model = adapted()
    before = values(model)
    for array in verbs.named_pairs(model).values():
        array[...] = 0
    for array in verbs.to_adapter(model).tensors.values():
        array[...] = 0
    same(values(model), before)


def test_heads_go_with_whole_adapters_and_with_no_selection(tmp_path):
    model = adapted()
    model["lm_head"].kernel = model["lm_head"].kernel + 1
    folding.save(model, tmp_path)
    other = folding.load(plain(), tmp_path)
    assert np.array_equal(other["lm_head"].kernel, model["lm_head"].kernel)
    same(values(folding.load(plain(), tmp_path, heads=False)), values(model))
    without = folding.load(plain(), tmp_path, heads=False)
    assert np.array_equal(without["lm_head"].kernel, plain()["lm_head"].kernel)
    folding.save(model, tmp_path, [SWA])
    assert flix.load_adapter(tmp_path).heads == {}
    folding.save(model, tmp_path, heads=["lm_head"])
    assert set(flix.load_adapter(tmp_path).heads) == {"lm_head.kernel"}
    folding.save(model, tmp_path, heads=[])
    assert flix.load_adapter(tmp_path).heads == {}


def test_a_head_is_no_adapted_kernel(tmp_path):
    model = adapted()
    with pytest.raises(AdapterError, match=r"'q\.kernel' is the kernel of the adapted layer 'q'"):
        folding.save(model, tmp_path, heads=["q"])
    with pytest.raises(AdapterError, match="no parameter or module 'head'"):
        folding.save(model, tmp_path, heads=["head"])
    with pytest.raises(AdapterError, match="heads belong to all"):
        folding.save(model, tmp_path, [SWA], heads=["lm_head"])
    found = verbs.to_adapter(model)
    kernel = Head.of(model["q"].kernel)
    flix.save_adapter(replace(found, heads={"q.kernel": kernel}), tmp_path)
    with pytest.raises(AdapterError, match=r"'q\.kernel' is the kernel of the adapted layer 'q'"):
        folding.load(plain(), tmp_path)
    assert flix_numpy.primitives.adapted(folding.load(plain(), tmp_path, heads=False))


def test_a_backend_without_heads_says_so(tmp_path):
    folding.save(adapted(), tmp_path)
    model = plain()
    with pytest.raises(AdapterError, match=r"trained heads \(lm_head\.kernel\).*heads=False"):
        verbs.load(model, tmp_path)
    assert flix_numpy.primitives.adapted(model) is None
    assert flix_numpy.primitives.adapted(verbs.load(model, tmp_path, heads=False))
    with pytest.raises(
        AdapterError, match="this backend has no parameters other than the features'"
    ):
        verbs.save(adapted(), tmp_path, heads=["lm_head"])


def test_a_model_is_untouched_where_its_heads_have_no_place(tmp_path):
    folding.save(adapted(), tmp_path)
    model = plain()
    model["lm_head"].kernel = np.zeros((5, 4), np.float32)
    with pytest.raises(AdapterError, match=r"'lm_head\.kernel' has the shape \[5, 3\]"):  # fmt: skip
        folding.load(model, tmp_path)
    assert flix_numpy.primitives.adapted(model) is None
    with pytest.raises(AdapterError, match="layer 'k'"):  # layers are named before heads are
        folding.load(plain(k=(6, 4), lm_head=(4, 3)), tmp_path)


def test_a_load_onto_another_base_warns_and_names_both(tmp_path):
    folding.save(adapted(), tmp_path)
    base = flix.load_adapter(tmp_path).base
    assert base.name == "example" and len(base.fingerprint) == 33
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folding.load(plain(), tmp_path)
        folding.load(adapted(), tmp_path)
        folding.merge_in_place(model := adapted(), ROW)
        folding.save(model, tmp_path / "folded")  # of the base's own kernels
        verbs.load(plain(), tmp_path, heads=False)  # knows no bases
    assert flix.load_adapter(tmp_path / "folded").base == base
    other = plain()
    other["q"].kernel = other["q"].kernel + 1
    with pytest.warns(UserWarning, match=f"trained on 'example' .*{base.fingerprint}.*onto 'example'"):  # fmt: skip
        folding.load(other, tmp_path)
