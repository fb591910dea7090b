"""Features that join, leave, are renamed, and come from other adapters."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("flix_numpy")

import flix_numpy

import flix
from flix import AdapterError, FeatureError, RankError
from tests.helpers.example import POS, SWA, adapted, donor, plain, same, tokens, values, verbs
from tests.helpers.loras import write_lora
from tests.helpers.registry import IDS, WEIGHTS
from tests.helpers.tolerance import assert_close, assert_far


def test_a_new_feature_keeps_ids_and_values_and_trains_alone():
    model = adapted()
    before, out = values(model), model(tokens(), IDS, WEIGHTS)
    assert verbs.add_feature(model, "language", "ibo", 3) is model
    same(values(model), before)
    assert_close(model(tokens(), IDS, WEIGHTS), out)
    assert model.state.config.registry.id("language", "ibo") == 6
    assert values(model)["k.A.language.ibo"].shape == (3, 6)
    assert {f for own in verbs.trainable_parameters(model).values() for f in own} == {
        ("language", "ibo")
    }


def test_others_train_on_where_that_is_asked_for_and_frozen_ones_stay_frozen():
    model = verbs.freeze(adapted(), [SWA])
    verbs.add_feature(model, "language", "ibo", 3, freeze_others=False)
    assert set(flix_numpy.primitives.frozen(model)) == {SWA}


def test_a_new_feature_takes_the_rank_and_the_update_of_its_origin():
    model = verbs.add_feature(adapted(), "language", "swc", init_from="swa")
    config_ = model.state.config
    assert config_.ranks["language", "swc"] == 3
    for path in ("q", "k"):
        (a, b), (c, d) = model[path].pairs[SWA], model[path].pairs["language", "swc"]
        scales = [config_.scale(path, f) for f in (SWA, ("language", "swc"))]
        assert_close(scales[1] * d @ c, scales[0] * b @ a)


def test_a_new_feature_starts_from_the_mean_of_several():
    model = verbs.add_feature(adapted(), "language", "mix", 6, init_from=["swa", "zul", "yor"])
    path, scale = "k", model.state.config.scale

    def update(feature):
        a, b = model[path].pairs[feature]
        return scale(path, feature) * b.astype(np.float64) @ a

    mean = (update(SWA) + update(("language", "zul"))) / 3  # of which one has rank 0
    assert_close(update(("language", "mix")), mean, dtype="float32")


def test_alpha_and_implications_of_a_new_feature():
    model = verbs.add_feature(adapted(), "language", "ibo", 2, alpha=8.0, implies=[POS])
    assert model.state.config.scale("q", ("language", "ibo")) == 4.0
    assert model.state.config.registry.encode([{"language": "ibo"}]).ids.tolist() == [[5, 6]]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("language", "swa", 2), {}, FeatureError, "swa"),
        (("dialect", "x", 2), {}, FeatureError, "dialect"),
        (("language", "ibo", 2), {"init_from": "sva"}, FeatureError, "did you mean 'swa'"),
        (("language", "ibo"), {}, RankError, "needs a rank, or init_from"),
    ],
)
def test_features_that_cannot_join_are_refused_and_change_nothing(
    arguments, options, error, message
):
    model = adapted()
    before, registry = values(model), model.state.config.registry
    with pytest.raises(error, match=message):
        verbs.add_feature(model, *arguments, **options)
    same(values(model), before)
    assert model.state.config.registry is registry


def test_a_removed_feature_leaves_its_id_and_nothing_else():
    model = adapted()
    before = values(model)
    assert verbs.remove_feature(model, *SWA) is model
    after = values(model)
    assert set(before) - set(after) == {f"{p}.{part}.language.swa" for p in "qk" for part in "AB"}
    same(after, {name: value for name, value in before.items() if name in after})
    with pytest.raises(flix.RoutingError, match="language=swa, which was removed"):
        model(tokens(), IDS, WEIGHTS)
    verbs.add_feature(model, *SWA, 1)
    assert model.state.config.registry.id(*SWA) == 1


def test_the_last_of_a_group_and_strangers_are_not_removed():
    model = verbs.remove_feature(adapted(), "task", "ner")
    with pytest.raises(FeatureError, match="task"):
        verbs.remove_feature(model, "task", "pos")
    with pytest.raises(FeatureError, match="ner"):
        verbs.remove_feature(model, "task", "ner")


def test_a_renamed_feature_keeps_its_id_values_and_whether_it_trains():
    model = verbs.freeze(adapted(), [SWA])
    before, out = values(model), model(tokens(), IDS, WEIGHTS)
    assert verbs.rename_feature(model, *SWA, "swc") is model
    same(values(model), {name.replace(".swa", ".swc"): v for name, v in before.items()})
    assert_close(model(tokens(), IDS, WEIGHTS), out)
    assert model.state.config.registry.id("language", "swc") == 1
    assert set(flix_numpy.primitives.frozen(model)) == {("language", "swc")}
    with pytest.raises(FeatureError, match="zul"):
        verbs.rename_feature(model, "language", "swc", "zul")


def test_features_join_with_what_they_imply_at_their_own_scale():
    model, other = adapted(), donor()
    before, adapter = values(model), verbs.to_adapter(other)
    assert verbs.load_features(model, adapter, {"language": "ibo"}) is model
    same(values(model), before)
    joined = {n: v for n, v in values(other).items() if n.endswith((".ibo", ".mt"))}
    same(values(model), joined)
    assert model.state.config.registry.id("language", "ibo") == 6
    row = {"language": "ibo"}
    for found, theirs in zip(
        verbs.merge(model, row).values(), verbs.merge(other, row).values(), strict=True
    ):
        assert_close(found.kernel, theirs.kernel)


def test_features_join_from_a_folder_and_train_alone_if_that_is_asked_for(tmp_path):
    verbs.save(donor(), tmp_path, [("language", "ibo")])
    model = verbs.load_features(adapted(), tmp_path, freeze_others=True)
    trains = {f for own in verbs.trainable_parameters(model).values() for f in own}
    assert trains == {("language", "ibo"), ("task", "mt")}
    model = verbs.load_features(adapted(), tmp_path)
    assert not flix_numpy.primitives.frozen(model)


def test_features_that_differ_are_a_conflict_that_the_user_settles():
    adapter = verbs.to_adapter(donor())
    with pytest.raises(AdapterError, match="language=swa"):
        verbs.load_features(adapted(), adapter)
    kept = verbs.load_features(adapted(), adapter, conflicts="keep")
    same(values(kept), values(adapted()))
    replaced = verbs.load_features(adapted(), adapter, conflicts="replace")
    same(values(replaced), values(donor()))


def test_layers_that_only_the_other_adapter_has_become_adapted():
    model = verbs.load_features(
        adapted(target_modules=["q"]), verbs.to_adapter(donor()), {"task": "mt"}
    )
    assert verbs.summary(model).layers == ("q", "k")
    assert set(model["k"].pairs) == {("task", "mt")}
    ids = model.state.config.registry.encode([{"task": "mt"}]).ids
    base = plain()
    assert_far(model(tokens(1), ids), base(tokens(1)))


def test_layer_paths_are_translated():
    adapter = verbs.to_adapter(donor()).renamed({"q": "attn.q", "k": "attn.k"})
    model = verbs.load_features(
        adapted(), adapter, [("task", "mt")], rename=lambda path: path.removeprefix("attn.")
    )
    assert ("task", "mt") in model["q"].pairs
    with pytest.raises(AdapterError, match=r"no layer 'attn\.q'"):
        verbs.load_features(adapted(), adapter, [("task", "mt")])


def _loras(folder):
    rng = np.random.default_rng(3)
    draw = {
        name: {"q": (rng.normal(size=(r, 4)), rng.normal(size=(6, r)))}
        for name, r in (("ner", 2), ("mt", 3))
    }
    pairs = {
        name: {p: tuple(v.astype(np.float32) for v in pair) for p, pair in own.items()}
        for name, own in draw.items()
    }
    return {n: write_lora(folder / n, own, alpha=4.0) for n, own in pairs.items()}, pairs


def test_loras_of_peft_adapt_a_plain_model_in_their_layers(tmp_path):
    folders, pairs = _loras(tmp_path)
    model = verbs.import_peft(plain(), folders, "task")
    assert verbs.summary(model).layers == ("q",)
    a, b = pairs["mt"]["q"]
    kernel = verbs.merge(model, {"task": "mt"})["q"].kernel
    assert_close(kernel, plain()["q"].kernel + 4 / 3 * (b @ a).T)


def test_loras_of_peft_join_an_adapted_model(tmp_path):
    folders, pairs = _loras(tmp_path)
    model = adapted()
    before = values(model)
    with pytest.raises(AdapterError, match="task=ner"):
        verbs.import_peft(model, folders, "task")
    assert verbs.import_peft(model, {"mt": folders["mt"]}, "task") is model
    same(values(model), before)
    assert np.array_equal(values(model)["q.A.task.mt"], pairs["mt"]["q"][0])
    same(values(verbs.import_peft(model, {"x": folders["ner"]}, "lora")), before)
