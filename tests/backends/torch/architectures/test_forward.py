"""Routed forwards and their gradients through real architectures, loaded from folders."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix import RoutingError  # noqa: E402
from flix.backends.torch import adapt, merge, routed  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    dense_model,
    live_pairs,
    output,
    project_back,
    randomize,
    routing,
    updated,
)
from tests.helpers.zoo import DECODERS, ENCODERS, ZOO, inputs_of, pretrained, weights_of  # noqa: E402

TINY = [name for name in ZOO if name != "minilm"]


def adapted_pair(name, **changes):
    """A plain model with its head untied (the dense reference replaces kernels by name), and its adapted copy."""
    weights_of(name)
    base = pretrained(name)
    if hasattr(base, "lm_head"):
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    adapted = adapt(copy.deepcopy(base), config(**changes))
    randomize(adapted)
    return base, adapted


def held_to_dense_rows(name, **changes):
    base, adapted = adapted_pair(name, **changes)
    ids, weights = routing()
    inputs = inputs_of(name)
    expected, leaves, weight_leaf = dense_model(base, adapted, ids, weights, inputs)
    own_weights = weights.double().requires_grad_()
    found = output(adapted(**inputs, flix_features=ids, flix_weights=own_weights))
    inside = ZOO[name].inside
    assert_close(found, expected, dtype=inside)
    assert_far(found, output(base(**inputs)))
    project_back(found)
    project_back(expected)
    for pair, parameter in live_pairs(adapted).items():
        leaf = leaves[pair]
        if ".zul" in pair:
            assert parameter.grad is None, f"{pair} is absent from the batch"
        elif leaf.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), pair
        else:
            assert_close(parameter.grad, leaf.grad, name=pair, dtype=inside)
    active = ids >= 0
    assert_close(own_weights.grad[active], weight_leaf.grad[active], dtype=inside)
    return adapted


@over(ZOO, "mixed batch", "gradients")
def test_mixed_batch_equals_dense_rows(name):
    held_to_dense_rows(name)


@over(ZOO, "embeddings", slow=["minilm"])
def test_adapted_embeddings_equal_dense_rows(name):
    adapted = held_to_dense_rows(name, target_modules=list(ZOO[name].embeddings))
    moved = [n for n, p in live_pairs(adapted).items() if p.grad is not None and p.grad.any()]
    for target in ZOO[name].embeddings:
        assert any(target in n for n in moved), f"{target} must train"


@over([*DECODERS, *ENCODERS], "per-token routing", slow=["minilm"])
def test_per_token_routing_equals_a_sum_at_every_position(name):
    # A pooler sees one position of each row, and cannot tell which.
    base, adapted = adapted_pair(name, exclude_modules=["pooler.dense"])
    inputs = inputs_of(name)
    ids, weights = routing()
    generator = torch.Generator().manual_seed(3)
    order = torch.randint(0, len(ROWS), inputs["input_ids"].shape, generator=generator)
    ids, weights = ids[order], weights[order].double()  # [B, T, W]
    found = output(adapted(**inputs, flix_features=ids, flix_weights=weights))
    project_back(found)
    gradients = {n: p.grad.clone() for n, p in live_pairs(adapted).items() if p.grad is not None}
    adapted.zero_grad()
    with updated(base, adapted, ids, weights) as pairs:
        expected = output(base(**inputs))
    assert_close(found, expected, dtype=ZOO[name].inside)
    by_row = output(adapted(**inputs, flix_features=ids[:, 0], flix_weights=weights[:, 0]))
    assert_far(by_row, expected)
    project_back(expected)
    for pair, gradient in gradients.items():
        assert_close(gradient, pairs[pair].grad, name=pair, dtype=ZOO[name].inside)


def _enable_checkpointing(model, reentrant):
    for stem in ("activation_checkpointing", "gradient_checkpointing"):  # its name since 5, before
        if hasattr(model, f"{stem}_enable"):
            getattr(model, f"{stem}_enable")(**{f"{stem}_kwargs": {"use_reentrant": reentrant}})
            return


@over(TINY, "checkpointing")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_plain_gradients(name, reentrant):
    _, model = adapted_pair(name)
    model.train()
    ids, weights = routing()
    inputs = inputs_of(name)
    calls = []
    layer = next(m for m in model.modules() if hasattr(m, "flix_A"))
    layer.register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        model.zero_grad()
        project_back(output(model(**inputs, flix_features=ids, flix_weights=weights)))
        return {n: p.grad.clone() for n, p in live_pairs(model).items() if p.grad is not None}

    plain = gradients()
    assert len(calls) == 1
    _enable_checkpointing(model, reentrant)
    found = gradients()
    assert len(calls) == 3, "the layer must have run again in the backward"
    assert found.keys() == plain.keys()
    for pair, gradient in plain.items():
        assert_close(found[pair], gradient, name=pair)


@over(TINY, "torch.compile", slow=[name for name in TINY if name != "llama"])
def test_a_whole_compiled_graph_gives_the_plain_result(name):
    torch._dynamo.reset()
    _, model = adapted_pair(name)
    inputs = inputs_of(name)
    ids, weights = routing()
    expected = output(model(**inputs, flix_features=ids, flix_weights=weights))
    project_back(expected)
    gradients = {n: p.grad.clone() for n, p in live_pairs(model).items() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = output(compiled(**inputs, flix_features=ids, flix_weights=weights))
    assert_close(found, expected)
    project_back(found)
    for pair, gradient in gradients.items():
        assert_close(live_pairs(model)[pair].grad, gradient, name=pair)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other, theirs = routing(ROWS[::-1])
        found = output(compiled(**inputs, flix_features=other, flix_weights=theirs))
    assert_close(found, output(model(**inputs, flix_features=other, flix_weights=theirs)))


def test_the_attention_of_a_mixture_of_experts():
    """Experts that are left out see no routing, whether transformers keeps them as one tensor or as layers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    settings = MixtralConfig(**ZOO["llama"].settings[1], num_local_experts=4, num_experts_per_tok=2)
    base = MixtralForCausalLM(settings).eval()
    adapted = adapt(copy.deepcopy(base), config(exclude_modules=r".*experts\..*"))
    randomize(adapted)
    assert {path.rsplit(".", 1)[1] for path, _ in flix_layers(adapted)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    ids, weights = routing()
    inputs = inputs_of("llama")
    expected, _, _ = dense_model(base, adapted, ids, weights, inputs)
    found = output(adapted(**inputs, flix_features=ids, flix_weights=weights))
    assert_close(found, expected)


def test_experts_of_linear_layers_need_one_composition():
    """They get the tokens that were sent to them, of any rows: mixed rows are refused, one composition is not."""

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))

        def forward(self, input_ids):
            y = torch.zeros_like(input_ids)
            for number, expert in enumerate(self.experts):
                mine = (input_ids[..., 0] > 0) == bool(number)
                y[mine] = expert(input_ids[mine])
            return y

    torch.manual_seed(0)
    model = adapt(Experts().double(), config()).eval()
    randomize(model)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    ids, weights = routing()
    with pytest.raises(RoutingError, match=r"layer 'experts\.0' got an input of leading shape"):
        model(x, flix_features=ids, flix_weights=weights)
    with routed(model, ROWS[1]):
        assert_close(model(x), merge(model, ROWS[1])(x))
