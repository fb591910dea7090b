"""One composition for calls that take no keyword: what ``routed`` reaches, and what it leaves alone."""

from __future__ import annotations

import copy
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import FeatureError, RoutingError, TargetError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    add_feature,
    merge_in_place,
    page,
    routed,
    unmerge,
)
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.registry import ROWS, config, registry  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import live_pairs, output, project_back, randomize, routing  # noqa: E402
from tests.helpers.zoo import ZOO, inputs_of, pretrained, weights_of  # noqa: E402

ROW = ROWS[1]


def _model(name="llama", **changes):
    weights_of(name)
    model = adapt(pretrained(name), config(**changes))
    randomize(model)
    return model.eval()


def _explicit(model, row, name="llama", rows=4):
    ids, weights = routing([row] * rows)
    return output(model(**inputs_of(name, rows), flix_features=ids, flix_weights=weights))


def _gradients(model, result):
    model.zero_grad()
    project_back(result)
    return {n: p.grad.clone() for n, p in live_pairs(model).items() if p.grad is not None}


@over(ZOO, "routed")
def test_every_row_of_any_batch_has_the_composition(name):
    model = _model(name, target_modules=list(ZOO[name].embeddings))
    for rows in (1, 4):
        expected = _explicit(model, ROW, name, rows)
        with routed(model, ROW):
            assert_close(output(model(**inputs_of(name, rows))), expected)
    expected = _gradients(model, _explicit(model, ROW, name))
    with routed(model, ROW):
        found = _gradients(model, output(model(**inputs_of(name))))
    assert found.keys() == expected.keys()
    for pair, gradient in expected.items():
        assert_close(found[pair], gradient, name=pair)


def test_inputs_may_be_positional_and_flat():
    model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)).double(), config())
    randomize(model)
    ids, weights = routing([ROW] * 3)
    for x in (torch.randn(3, 4), torch.randn(3, 5, 4), torch.randn(3, 2, 5, 4)):
        expected = model(x.double(), flix_features=ids, flix_weights=weights)
        with routed(model, ROW):
            assert_close(model(x.double()), expected)


def test_keywords_win_and_inner_contexts_win():
    model = _model()
    inputs = inputs_of("llama")
    other, base = _explicit(model, ROWS[0]), _explicit(model, {})
    with routed(model, ROW):
        assert_close(_explicit(model, ROWS[0]), other)
        with routed(model, ROWS[0]):
            assert_close(output(model(**inputs)), other)
        with routed(model, {}):
            assert_close(output(model(**inputs)), base)
        assert_close(output(model(**inputs)), _explicit(model, ROW))
        with pytest.raises(RoutingError, match="without flix_features"):
            model(**inputs, flix_weights=torch.ones(4, 1))


def test_it_ends_with_its_block_even_by_an_error():
    model = _model()
    with pytest.raises(KeyError), routed(model, ROW):
        raise KeyError
    for training in (True, False):
        with pytest.raises(RoutingError, match="called without routing"):
            model.train(training)(**inputs_of("llama"))


def test_other_models_and_copies_are_left_alone():
    model, other = _model(), _model()
    with routed(model, ROW):
        for stranger in (other, copy.deepcopy(model)):
            with pytest.raises(RoutingError, match="called without routing"):
                stranger(**inputs_of("llama"))
        with routed(other, ROWS[0]):
            found = output(model(**inputs_of("llama"))), output(other(**inputs_of("llama")))
    assert_close(found[0], _explicit(model, ROW))
    assert_close(found[1], _explicit(other, ROWS[0]))


def test_threads_have_compositions_of_their_own():
    model = _model()
    expected = [_explicit(model, row).detach() for row in ROWS]
    found = [None] * len(ROWS)
    gate = threading.Barrier(len(ROWS))

    def work(number):
        with torch.no_grad(), routed(model, ROWS[number]):
            gate.wait()
            for _ in range(5):
                found[number] = output(model(**inputs_of("llama")))
            gate.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(ROWS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_a_routing_of_one_row_will_do():
    model = _model()
    with routed(model, registry().encode([ROW], group_weights={"language": 0.5})):
        found = output(model(**inputs_of("llama")))
    encoded = registry().encode([ROW] * 4, group_weights={"language": 0.5})
    assert_close(found, output(model(**inputs_of("llama"), flix_features=encoded)))
    assert_far(found, _explicit(model, ROW))


def test_what_it_refuses():
    model = _model()
    with pytest.raises(FeatureError, match="no feature 'swq'"), routed(model, {"language": "swq"}):
        pass
    with (
        pytest.raises(RoutingError, match=r"one composition for all rows.*\[2, 3\]"),
        routed(model, registry().encode(ROWS[:2])),
    ):
        pass
    stranger = flix.FeatureRegistry({"language": ["hau"]}).encode([{"language": "hau"}])
    with pytest.raises(RoutingError, match="another registry"), routed(model, stranger):
        pass
    plain = pretrained("llama")
    with pytest.raises(TargetError, match="needs an adapted model"), routed(plain, ROW):
        pass


def test_a_model_merged_in_place_does_not_route():
    model = _model()
    merge_in_place(model, ROW)
    with pytest.raises(RoutingError, match="merged in place"), routed(model, ROW):
        pass
    unmerge(model)
    with routed(model, ROW):
        model(**inputs_of("llama"))


def test_a_feature_added_and_parameters_changed_meanwhile_are_seen():
    model = _model()
    with torch.no_grad(), routed(model, ROWS[0]):
        before = output(model(**inputs_of("llama")))
        add_feature(model, "language", "ibo", rank=3)
        assert_close(output(model(**inputs_of("llama"))), before)
        for parameter in live_pairs(model).values():
            parameter.mul_(2.0)
        after = output(model(**inputs_of("llama")))
    assert_close(after, _explicit(model, ROWS[0]))
    assert_far(after, before)


def test_a_paged_model_brings_its_features():
    model = _model()
    expected = _explicit(model, ROW)
    page(model, 1_000_000)
    with torch.no_grad(), routed(model, ROW):
        assert_close(output(model(**inputs_of("llama"))), expected)


@pytest.mark.slow
def test_a_compiled_model_and_other_wrappers():
    torch._dynamo.reset()
    model = _model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with routed(compiled, ROW):
        found = output(compiled(**inputs_of("llama")))
    assert_close(found, _explicit(model, ROW))
    with routed(compiled, ROWS[0]):
        found = output(compiled(**inputs_of("llama")))
    assert_close(found, _explicit(model, ROWS[0]))
