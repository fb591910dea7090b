"""A model's life after training: features leave, are renamed, shared, switched off and frozen."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import AdapterError, FeatureError, RoutingError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    add_feature,
    disable,
    freeze,
    load,
    load_features,
    page,
    remove_feature,
    rename_feature,
    save,
    thaw,
    to_adapter,
    trainable_parameters,
)
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    ROW,
    adapted,
    batch,
    live_pairs,
    make,
    output,
    parameters_of,
    randomize,
    routing,
    run,
)
from tests.helpers.zoo import RELATIVES, ZOO, inputs_of  # noqa: E402

MADE = [name for name in ZOO if name != "minilm"]  # that one has weights of its own


def values(model):
    return {name: p.detach().clone() for name, p in live_pairs(model).items()}


# Leaving and other names


def test_removal_takes_a_features_update_and_nothing_else():
    model = adapted()
    before, kept = values(model), parameters_of(model)
    wanted = run(model, rows=[{"language": "swa"}, {"task": "ner"}])
    remove_feature(model, "language", "hau")
    after = live_pairs(model)
    assert (
        {n for n in before if n not in after} == {n for n in before if n.endswith(".hau")} != set()
    )
    # An optimizer's state stays with the parameters.
    assert parameters_of(model).keys() == kept.keys() - {("language", "hau")}
    assert all(p is kept[f] for f, p in parameters_of(model).items())
    assert_close(run(model, rows=[{"language": "swa"}, {"task": "ner"}]), wanted)
    with pytest.raises(FeatureError, match="no feature 'hau'"):
        run(model, rows=[{"language": "hau"}])
    with pytest.raises(RoutingError, match="language=hau, which was removed"):
        model(**batch("llama", rows=1), flix_features=torch.zeros(1, 1, dtype=torch.int64))


def test_a_removed_feature_comes_back_afresh_under_its_id(tmp_path):
    model = adapted()
    remove_feature(model, "language", "swa")
    save(model, tmp_path)
    again = load(make("llama"), tmp_path).eval()
    assert_close(run(again, rows=[{"task": "pos"}]), run(model, rows=[{"task": "pos"}]))
    add_feature(again, "language", "swa", rank=2)
    assert again.flix_config.registry.id("language", "swa") == 1
    fresh = adapt(make("llama"), config(ranks={**config().ranks, ("language", "swa"): 2}))
    name = "model.layers.0.self_attn.q_proj.A.language.swa"
    assert torch.equal(live_pairs(again)[name], live_pairs(fresh)[name])


def test_renaming_keeps_ids_parameters_and_outputs():
    model = adapted()
    kept, before, wanted = parameters_of(model), values(model), run(model)
    rename_feature(model, "language", "swa", "swh")
    names = {("language", "swa"): ("language", "swh")}
    after = parameters_of(model)
    assert len(after) == len(kept) and all(after[names.get(f, f)] is p for f, p in kept.items())
    now = values(model)
    assert all(torch.equal(now[n.replace(".swa", ".swh")], p) for n, p in before.items())
    found = run(
        model,
        rows=[{**ROW, "language": "swh"}, {"language": "hau", "task": "ner"}, {"task": "pos"}],
    )
    assert_close(found, wanted)
    with pytest.raises(FeatureError, match="no feature 'swa'"):
        run(model)


def test_an_optimizer_goes_on_after_a_removal():
    model = adapted().train()
    optimizer = torch.optim.AdamW(trainable_parameters(model), 0.1)

    def step():
        encoded = model.flix_config.registry.encode([{"language": "swa", "task": "ner"}])
        optimizer.zero_grad()
        output(model(**batch("llama", rows=1), flix_features=encoded)).sum().backward()
        optimizer.step()

    step()
    remove_feature(model, "language", "hau")
    rename_feature(model, "task", "pos", "upos")
    before = values(model)
    step()
    after = values(model)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {n for n in after if n.endswith((".swa", ".ner"))}


# One language's file, other people's files


@over(MADE, "share a feature", slow=RELATIVES)
def test_one_language_is_shared_without_the_rest(name, tmp_path):
    giver, taker = adapted(name, 0), adapted(name, 1)
    add_feature(giver, "language", "kin", rank=3)
    randomize(giver, 5)
    save(giver, tmp_path, features={"language": "kin"})
    share = flix.load_adapter(tmp_path)
    assert share.config.registry.features == (("language", "kin"),)
    before = values(taker)
    features = taker.flix_config.registry.features
    assert load_features(taker, tmp_path) is taker
    assert taker.flix_config.registry.features == (*features, ("language", "kin"))
    after = live_pairs(taker)
    assert all(torch.equal(after[n], p) for n, p in before.items())
    new = [n for n in after if n not in before]
    assert new and all(torch.equal(after[n], live_pairs(giver)[n]) for n in new)
    rows = [{"language": "kin"}]
    assert_close(run(taker, name, rows), run(giver, name, rows))


def test_conflicts_with_the_models_own_features(tmp_path):
    giver, taker = adapted(seed=0), adapted(seed=1)
    save(giver, tmp_path)
    before, wanted = values(taker), run(giver, rows=[ROW])
    with pytest.raises(
        AdapterError,
        match=r"5 feature\(s\) differ .*language=hau \(the model and the adapter: other",
    ):
        load_features(taker, tmp_path)
    load_features(taker, tmp_path, {"language": "swa"}, conflicts="keep")
    assert all(torch.equal(p, before[n]) for n, p in live_pairs(taker).items())
    load_features(taker, tmp_path, {"language": "swa", "task": "pos"}, conflicts="replace")
    assert taker.flix_config.registry == giver.flix_config.registry
    assert_close(run(taker, rows=[ROW]), wanted)
    assert torch.equal(live_pairs(taker)["model.layers.0.self_attn.q_proj.A.task.ner"],
                       before["model.layers.0.self_attn.q_proj.A.task.ner"])  # fmt: skip


def test_every_feature_may_be_replaced_at_once():
    taker = adapted(seed=1)
    load_features(taker, to_adapter(adapted()), conflicts="replace", freeze_others=True)
    assert_close(run(taker), run(adapted()))
    assert all(p.requires_grad for p in live_pairs(taker).values())


def test_features_bring_layers_that_were_not_adapted():
    narrow = adapt(make("llama"), config(target_modules=["q_proj"]))
    randomize(narrow, 1)
    wide = adapted()
    add_feature(wide, "task", "topic", rank=2)
    randomize(wide, 3)
    wanted = run(narrow.eval(), rows=[ROW])
    load_features(narrow, to_adapter(wide), {"task": "topic"}, freeze_others=True)
    assert len(list(flix_layers(narrow))) == 14
    assert_close(run(narrow, rows=[ROW]), wanted)
    assert_close(run(narrow, rows=[{"task": "topic"}]), run(wide, rows=[{"task": "topic"}]))
    trained = {n for n, p in narrow.named_parameters() if p.requires_grad}
    assert trained and all(n.endswith("task:topic") for n in trained)


def test_an_adapter_of_another_model_is_refused():
    other = adapt(make("gpt2"), config())
    with pytest.raises(
        AdapterError, match=r"made for another architecture: .* no layer 'transformer.h.0"
    ):
        load_features(adapted(), to_adapter(other))


def test_pages_follow_a_change():
    model, plain = adapted(), adapted()
    other = adapted(seed=4)
    page(model, 10**7)
    for one in (model, plain):
        run(one)
        load_features(one, to_adapter(other), {"language": "swa"}, conflicts="replace")
    assert torch.equal(run(model), run(plain))


# Switching


@over(MADE, "disable", slow=RELATIVES)
def test_disabled_the_model_is_its_base(name):
    model = adapted(name)
    with torch.no_grad():
        base = output(make(name).eval()(**inputs_of(name, rows=3)))
    wanted = run(model, name)
    with disable(model):
        with torch.no_grad():
            assert_close(output(model(**inputs_of(name, rows=3))), base)
        assert_close(run(model, name), base)
        model.train()
        output(model(**inputs_of(name, rows=3)))  # no routing is asked for, in training either
        model.eval()
        with disable(model):
            pass
        assert_close(run(model, name), base)
    assert_close(run(model, name), wanted)
    assert_far(wanted, base)


def test_disable_ends_with_its_context_even_after_an_error():
    model = adapted()
    wanted = run(model)
    with pytest.raises(KeyError), disable(model):
        raise KeyError
    assert_close(run(model), wanted)


def test_frozen_features_stay_and_thawed_ones_train():
    model = adapted().train()
    freeze(model, {"language": "swa"})

    def trained():
        return {n.rsplit("language:", 1)[-1].rsplit("task:", 1)[-1] for n, p in model.named_parameters() if p.requires_grad}  # fmt: skip

    assert trained() == {"hau", "zul", "ner", "pos"}
    freeze(model, [("task", "ner"), ("task", "pos")])
    assert trained() == {"hau", "zul"}
    thaw(model, {"task": "ner"})
    assert trained() == {"hau", "zul", "ner"}
    thaw(model)
    assert trained() == {"hau", "swa", "zul", "ner", "pos"}
    with pytest.raises(FeatureError, match="no feature 'nre'"):
        freeze(model, {"task": "nre"})


# Merging for a while


# Two adapters, one base


def test_changes_reach_a_compiled_model():
    model = adapted()
    model.to(torch.float32)
    run(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, weights = (t[:2] for t in routing([ROW, {"language": "swa"}]))
    inputs = batch("llama", rows=2)
    with torch.no_grad():
        output(compiled(**inputs, flix_features=ids, flix_weights=weights))
        remove_feature(model, "language", "hau")
        randomize(model, 9)
        found = output(compiled(**inputs, flix_features=ids, flix_weights=weights))
        plain = output(model(**inputs, flix_features=ids, flix_weights=weights))
    assert_close(found, plain)
    # Nothing can be raised in a graph: rows under a removed feature are NaN, never the base's.
    ids = torch.tensor([[0, 5], [1, 5]])
    with torch.no_grad():
        found = output(compiled(**inputs, flix_features=ids))
    assert found[0].isnan().all() and found[1].isfinite().all()
