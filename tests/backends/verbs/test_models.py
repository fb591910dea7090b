"""Adapting, freezing, counting, disabling: what the verbs decide, refuse, and hand to the primitives."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("flix_numpy")

import flix_numpy

import flix
from flix import ConfigError, FeatureError, TargetError
from flix.backends.verbs import Verbs
from tests.helpers.example import POS, ROW, SWA, adapted, plain, same, tokens, values, verbs
from tests.helpers.registry import IDS, WEIGHTS, config
from tests.helpers.tolerance import assert_close, assert_far


def test_all_linear_leaves_out_the_head_and_the_embedding():
    model = plain()
    assert verbs.adapt(model, config()) is model
    assert verbs.summary(model).layers == ("q", "k")


def test_an_adapted_model_starts_as_its_base_with_the_cores_values():
    model = verbs.adapt(plain(), config())
    assert_close(model(tokens(), IDS, WEIGHTS), plain()(tokens()))
    fresh = values(model)
    assert fresh["q.A.language.swa"].shape == (3, 4) and not fresh["q.B.language.swa"].any()
    assert "q.A.language.yor" not in fresh  # of rank 0
    other = verbs.adapt(plain(), config(target_modules=["q"]))
    same(fresh, values(other))  # of another layer's making, the same bytes


def test_layers_are_chosen_by_the_configuration():
    model = verbs.adapt(plain(), config(target_modules=["embed", "lm_head"]))
    assert verbs.summary(model).layers == ("embed", "lm_head")
    with pytest.raises(TargetError, match=r"'kk' matches no layer"):
        verbs.adapt(plain(), config(target_modules=["kk"]))


@pytest.mark.parametrize(
    ("model", "settings", "options", "error", "message"),
    [
        (plain, None, {}, ConfigError, "needs a FlixConfig, got NoneType"),
        (plain, config(), {"strategy": "fast"}, ConfigError, "strategy"),
        (adapted, config(), {}, TargetError, "adapted already"),
        (dict, config(), {}, TargetError, "expected a flix_numpy.Model, got dict"),
    ],
)
def test_what_cannot_be_adapted_is_refused(model, settings, options, error, message):
    with pytest.raises(error, match=message):
        verbs.adapt(model(), settings, **options)


def test_every_verb_refuses_a_model_that_is_not_adapted(tmp_path):
    calls = {
        "add_feature": ("language", "ibo", 2),
        "remove_feature": SWA,
        "rename_feature": (*SWA, "swc"),
        "load_features": (tmp_path,),
        "freeze": ([SWA],),
        "thaw": (),
        "save": (tmp_path,),
        "to_adapter": (),
        "named_pairs": (),
        "trainable_parameters": (),
        "summary": (),
        "merge": (ROW,),
    }
    for verb, arguments in calls.items():
        with pytest.raises(TargetError, match=f"{verb} needs an adapted model, but this Model is"):
            getattr(verbs, verb)(plain(), *arguments)
    with pytest.raises(TargetError, match="disable needs an adapted model"), verbs.disable(plain()):
        pass


def test_frozen_features_are_named_in_either_form_and_thaw_again():
    model = adapted()
    assert verbs.freeze(model, {"language": ["hau", "swa"]}) is model
    verbs.freeze(model, [POS])
    assert set(model.state.frozen) == {("language", "hau"), SWA, POS}
    assert verbs.thaw(model, {"task": "pos"}) is model
    assert set(model.state.frozen) == {("language", "hau"), SWA}
    verbs.thaw(model)
    assert not model.state.frozen
    for verb in (verbs.freeze, verbs.thaw):
        with pytest.raises(FeatureError, match="did you mean 'swa'"):
            verb(model, [("language", "sva")])


def test_summary_counts_what_is_there_and_what_trains():
    model = adapted()
    base = 7 * 4 + 4 * 6 + 6 * 5 + 5 + 5 * 3
    of_rank = 4 + 6 + 6 + 5
    found = verbs.summary(model)
    assert found.features[SWA] == 3 * of_rank and found.ranks[SWA] == 3
    assert found.trainable == 12 * of_rank and found.total == base + 12 * of_rank
    verbs.freeze(model, [SWA])
    assert verbs.summary(model).trainable == 9 * of_rank
    assert verbs.summary(model).total == base + 12 * of_rank
    verbs.remove_feature(model, *SWA)
    after = verbs.summary(model)
    assert SWA not in after.features and SWA not in after.ranks
    assert after.trainable == 9 * of_rank and after.total == base + 9 * of_rank
    assert "2 adapted layers" in str(after)


def test_summary_adds_what_the_backend_counts_beside():
    class Primitives(flix_numpy.Primitives):
        def count(self, model):
            return flix_numpy.Counts(total=100, trainable=10)

    found = Verbs(Primitives()).summary(adapted(ranks=1))
    assert (found.total, found.trainable) == (100 + 6 * 21, 10 + 6 * 21)


def test_disable_gives_the_base_alone_and_nests():
    model, base = adapted(), plain()(tokens())
    with verbs.disable(model):
        assert_close(model(tokens()), base)
        with verbs.disable(model):
            assert_close(model(tokens(), IDS, WEIGHTS), base)
        assert_close(model(tokens(), IDS, WEIGHTS), base)
        assert np.array_equal(model["q"](np.eye(4)[:2], None, WEIGHTS), model["q"].kernel[:2])
    assert_far(model(tokens(), IDS, WEIGHTS), base)
    with pytest.raises(flix.RoutingError, match="give both"):
        model(tokens(), None, WEIGHTS)


def test_disabled_models_that_overlap_and_errors_leave_the_model_as_it_was():
    model, base = adapted(), plain()(tokens())
    first, second = verbs.disable(model), verbs.disable(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert_close(model(tokens(), IDS, WEIGHTS), base)
    second.__exit__(None, None, None)
    assert_far(model(tokens(), IDS, WEIGHTS), base)
    with pytest.raises(KeyError), verbs.disable(model):
        raise KeyError
    assert_far(model(tokens(), IDS, WEIGHTS), base)


def test_every_verb_is_documented_and_takes_the_model_first():
    public = [name for name in vars(flix_numpy) if callable(getattr(Verbs, name, None))]
    assert len(public) >= 17
    for name in [*public, "merge_in_place", "unmerge", "export_peft"]:
        verb = getattr(verbs, name)
        assert inspect.getdoc(verb), name
        assert next(iter(inspect.signature(verb).parameters)) == "model", name


def test_a_backend_without_dropout_refuses_it_and_reads_files_that_had_it(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"lora_dropout=0\.1.* is not possible: the layers of this backend do not support it; set",
    ):
        verbs.adapt(plain(), config(lora_dropout=0.1))
    adapter = verbs.to_adapter(adapted())
    adapter = flix.Adapter(
        replace(adapter.config, lora_dropout=0.1), adapter.layers, adapter.tensors
    )
    with pytest.warns(UserWarning, match=r"cannot be trained further as it was: lora_dropout=0\.1"):
        model = verbs.load_into(plain(), adapter)
    assert verbs.to_adapter(model).config.lora_dropout == 0.1


def test_models_start_orthogonal_where_asked_and_features_that_join():
    model = verbs.adapt(plain(), config(init="orthogonal"))
    model = verbs.add_feature(model, "task", "new", rank=3)
    found = values(model)
    for name in ("q.A.language.swa", "k.A.task.new"):
        np.testing.assert_allclose(found[name] @ found[name].T, np.eye(3), atol=1e-6)
    assert not found["q.B.language.swa"].any()
    assert_close(model(tokens(), IDS, WEIGHTS), plain()(tokens()))
