"""The mistakes that users make, and what they are told: the rule, what was got, what would do."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import AdapterError, FeatureError, RoutingError, TargetError  # noqa: E402
from flix.backends.torch import adapt, load, merge, save  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.registry import ROWS, config, registry  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import output, randomize, routing  # noqa: E402
from tests.helpers.zoo import DECODERS, ENCODER_DECODERS, inputs_of, pretrained  # noqa: E402

ROW = {"language": {"hau": 1.0, "swa": 0.5}, "task": "ner"}
GENERATORS = [DECODERS[0], ENCODER_DECODERS[0]]


def _adapted(name="llama", **changes):
    model = adapt(pretrained(name), config(**changes))
    randomize(model)
    return model.eval()


# Unknown features and groups


@pytest.mark.parametrize(
    "row,message",
    [
        ({"language": "hsu"}, r"row 1: group 'language' has no feature 'hsu' \(did you mean 'hau'"),
        ({"langauge": "hau"}, r"row 1: no feature group 'langauge' \(did you mean 'language'"),
    ],
)
def test_an_unknown_feature_or_group_is_named_with_its_row(row, message):
    with pytest.raises(FeatureError, match=message):
        registry().encode([{"language": "swa"}, row])


def test_an_id_of_no_feature_is_named_with_its_row():
    ids, _ = routing()
    ids[2, 1] = 6
    with pytest.raises(RoutingError, match=r"the id 6 in row 2 .*valid ids are 0 to 5"):
        _adapted()(**inputs_of("llama"), flix_features=ids)


def test_routing_by_another_registry_is_refused():
    other = flix.FeatureRegistry({"language": ["hau"], "task": ["ner"]})
    with pytest.raises(RoutingError, match="encoded by another registry"):
        _adapted()(**inputs_of("llama"), flix_features=other.encode([{"task": "ner"}] * 4))


# Routing of another size than the batch


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_routing_of_another_batch_size(name):
    ids, _ = routing()
    with pytest.raises(RoutingError, match="routes 4 rows, but the batch has 3 rows"):
        _adapted(name)(**inputs_of(name, rows=3), flix_features=ids)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(
    "way", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_routing_of_another_batch_size_in_generation(name, way):
    """The numbers are those that the caller gave, not those after rows were repeated for beams."""
    model = _adapted(name)
    ids, _ = routing()
    prompt = inputs_of(name, rows=3)["input_ids"]
    for features in (ids, registry().encode(ROWS)):
        for given in (((prompt,), {}), ((), {"input_ids": prompt}), ((), {"inputs": prompt})):
            with pytest.raises(RoutingError, match="routes 4 rows, but the batch has 3 rows"):
                model.generate(
                    *given[0], **given[1], flix_features=features, max_new_tokens=2, **way
                )


@pytest.mark.parametrize("name", GENERATORS)
def test_weights_without_features_are_refused(name):
    with pytest.raises(RoutingError, match="weights belong to ids"):
        _adapted(name)(**inputs_of(name), flix_weights=torch.ones(4, 2))
    with pytest.raises(RoutingError, match="weights belong to ids"):
        _adapted(name).generate(inputs_of(name)["input_ids"], flix_weights=torch.ones(4, 2))


# Routing that is missing


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_routing_missing(name):
    for training in (True, False):
        with pytest.raises(
            RoutingError, match=r"called without routing; call it as .*flix_features=ids"
        ):
            _adapted(name).train(training)(**inputs_of(name))


@pytest.mark.parametrize("name", GENERATORS)
def test_generation_without_routing_is_refused(name):
    with pytest.raises(RoutingError, match="called without routing"):
        _adapted(name).generate(inputs_of(name)["input_ids"], max_new_tokens=2)


# Targets, adapting twice, files of another architecture


@pytest.mark.parametrize(
    "name,targets,message",
    [
        ("llama", ["q_porj"], r"'q_porj' matches no layer \(did you mean 'q_proj'"),
        ("gpt2", ["q_proj"], r"'q_proj' matches no layer.*c_proj"),
        ("bert", r".*\.attn\..*", "matches no layer"),
        ("t5", ["layer_norm"], "layer_norm', which cannot be adapted"),
        ("bart", ["embed_positions"], "BartLearnedPositionalEmbedding has a forward of its own"),
    ],
)
def test_targets_that_match_nothing_or_what_cannot_be_adapted(name, targets, message):
    model = pretrained(name)
    with pytest.raises(TargetError, match=message):
        adapt(model, config(target_modules=targets))
    assert not list(flix_layers(model))


def test_an_embedding_with_another_forward_is_not_taken_for_a_scaled_one():
    class Squared(torch.nn.Embedding):
        embed_scale = 2.0

        def forward(self, x):
            return super().forward(x).square() * self.embed_scale

    class Lookup(torch.nn.Embedding):
        embed_scale = 2.0  # not heeded by the forward

    for kind in (Squared, Lookup):
        with pytest.raises(TargetError, match=f"class {kind.__name__} has a forward of its own"):
            adapt(torch.nn.Sequential(kind(8, 4)), config(target_modules=["0"]))


def test_adapting_twice_is_refused():
    model = _adapted()
    with pytest.raises(TargetError, match="adapted already; add features with add_feature"):
        adapt(model, config())


@pytest.mark.parametrize("name,other", [("llama", "gpt2"), ("t5", "bart"), ("bert", "xlm-r")])
def test_an_adapter_for_another_architecture_names_the_first_layer_that_differs(
    name, other, tmp_path
):
    model = _adapted(name)
    if (name, other) == ("bert", "xlm-r"):  # the same layers: make one differ
        model = _adapted(name, target_modules=["query", "position_embeddings"])
    save(model, tmp_path)
    stranger = pretrained(other)
    first = {
        "gpt2": r"no layer 'model\.layers\.0\.self_attn\.q_proj'",
        "bart": r"no layer 'encoder\.block\.0\.layer\.0\.SelfAttention\.q'",
        "xlm-r": r"layer 'embeddings\.position_embeddings' is embedding 64 -> 16 in the adapter "
        r"and embedding 66 -> 16",
    }[other]
    with pytest.raises(AdapterError, match=f"another architecture.*{first}"):
        load(stranger, tmp_path)
    assert not list(flix_layers(stranger))


# Merged models


def _twins(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return {
        "itself": model,
        "copy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_a_merged_model_refuses_to_route(name):
    merged = merge(_adapted(name), ROW)
    ids, weights = routing()
    inputs = inputs_of(name)
    expected = output(merged(**inputs))
    for kind, twin in _twins(merged).items():
        for given in ({"flix_features": ids}, {"flix_weights": weights}):
            with pytest.raises(
                RoutingError,
                match=r"merged model; it holds the composition language=hau \+ language=swa x 0\.5 "
                r"\+ task=ner, for all rows",
            ):
                twin(**inputs, **given)
        assert_close(output(twin(**inputs)), expected, name=kind)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_merged_model_refuses_to_route_in_generation(name):
    merged = merge(_adapted(name), ROW)
    ids, _ = routing()
    prompt = inputs_of(name)["input_ids"]
    with pytest.raises(ValueError, match="flix_features"):
        merged.generate(prompt, flix_features=ids, max_new_tokens=2)
    assert merged.generate(prompt, max_new_tokens=2, do_sample=False).shape[0] == 4


def test_a_merged_model_adapted_anew_routes_again():
    merged = merge(_adapted(), ROW)
    again = adapt(merged, config(seed=1))
    randomize(again, seed=1)
    ids, weights = routing()
    found = output(again.eval()(**inputs_of("llama"), flix_features=ids, flix_weights=weights))
    twice = merge(again, {"task": "pos"})
    with pytest.raises(RoutingError, match=r"\+ task=ner, then task=pos, for all rows"):
        twice(**inputs_of("llama"), flix_features=ids)
    ids, weights = routing([{"task": "pos"}] * 4)
    expected = output(again(**inputs_of("llama"), flix_features=ids, flix_weights=weights))
    assert_close(output(twice(**inputs_of("llama"))), expected)
    assert_far(found, expected)


def test_a_merged_model_goes_out_as_a_plain_one():
    merged = merge(_adapted("bert"), ROW)
    inputs = inputs_of("bert")
    expected = output(merged(**inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(merged, (), dict(inputs), strict=False)
        compiled = torch.compile(merged, fullgraph=True, backend="eager")
    assert not [key for key in exported.state_dict if "flix" in key]
    assert_close(output(exported.module()(**inputs)), expected)
    assert_close(output(compiled(**inputs)), expected)
