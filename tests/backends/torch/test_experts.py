"""Kernels with an axis of experts, adapted: each token under its own row's features (docs/specification.md §1.4)."""

from __future__ import annotations

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch import nn  # noqa: E402

import flix  # noqa: E402
from flix import ConfigError, RoutingError, TargetError  # noqa: E402
from flix.backends.torch import adapt, disable, merge, routed  # noqa: E402
from flix.backends.torch.experts import experts_of  # noqa: E402
from tests.helpers.mixtures import (  # noqa: E402
    COMPOSITIONS,
    ONLY,
    adapted,
    answers,
    by_rows,
    kernels,
    make,
)
from tests.helpers.registry import IDS, WEIGHTS, config, registry  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    ROW,
    dense_model,
    live_pairs,
    output,
    parameters_of,
    project_back,
)
from tests.helpers.zoo import EXPERTS, inputs_of  # noqa: E402


@pytest.mark.parametrize("name", EXPERTS)
def test_all_linear_takes_the_kernels_of_experts(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted(name)
    base = make(name)
    wanted = {n for n, p in base.named_parameters() if p.dim() == 3}
    assert wanted and set(kernels(model)) == wanted
    for path, kernel in kernels(model).items():
        shape = kernel.shape_of(kernel)
        stored = tuple(base.get_parameter(path).shape)
        turned = (shape.experts, shape.d_in, shape.d_out)
        assert stored == (turned if kernel.flix_transposed else (turned[0], turned[2], turned[1]))
        assert shape.active == base.config.num_experts_per_tok
        assert kernel.flix_A["language", "swa"].shape == (shape.experts, 3, shape.d_in)
        assert kernel.flix_B["language", "swa"].shape == (shape.experts, shape.d_out, 3)
    assert (name == "gpt-oss") == any(k.flix_transposed for k in kernels(model).values())


def test_a_feature_is_one_parameter_whose_name_says_that_it_holds_experts():
    model = adapted()
    named = [n for n, _ in model.named_parameters() if "flix_" in n]
    assert named[0] == "flix_bank.language:hau:experts"
    assert len(named) == len(parameters_of(model)) == 5  # one has rank 0 everywhere
    plain = adapted(exclude_modules=ONLY)
    assert not any(n.endswith(":experts") for n, _ in plain.named_parameters())


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_experts_alone_equal_dense_kernels_of_each_row(name, strategy):
    model, base = adapted(name, target_modules=ONLY, strategy=strategy), make(name)
    ids, weights = torch.from_numpy(IDS), torch.from_numpy(WEIGHTS).double().requires_grad_()
    inputs = inputs_of(name, rows=len(IDS))
    result = output(model(**inputs, flix_features=ids, flix_weights=weights))
    wanted, pairs, factors = dense_model(base.eval(), model, ids, weights.detach(), inputs)
    assert_close(result, wanted)
    project_back(result)
    project_back(wanted)
    for name_, pair in live_pairs(model).items():
        if pairs[name_].grad is not None:
            assert_close(pair.grad, pairs[name_].grad)
        else:
            assert not pair.grad.any()
    present = torch.from_numpy(IDS) >= 0
    assert_close(weights.grad[present], factors.grad[present])
    assert weights.grad[present].any()


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_agree_with_loops(name, dtype):
    """Sizes of whole 16 bytes take torch's grouped product; what it gives is that of a row alone."""
    ranks = {"language": 8, "task": 16}
    settings = {"hidden_size": 32, "intermediate_size": 32}
    if name in ("qwen3-moe", "deepseek-v3"):
        settings["moe_intermediate_size"] = 32
    model = adapted(name, dtype, settings, target_modules=ONLY, ranks=ranks)
    again = adapted(name, torch.float64, settings, target_modules=ONLY, ranks=ranks)
    again.load_state_dict(model.state_dict())
    inputs = inputs_of(name, rows=4, length=16)
    found = answers(model, name, input_ids=inputs["input_ids"])
    wanted = answers(again, name, input_ids=inputs["input_ids"])
    if dtype == torch.float32:
        assert_close(found, wanted, dtype="float32")
    else:  # a token near the edge between two experts may go to the other one
        far = (found.double() - wanted).abs().amax(-1)
        assert far.median() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_the_base_gives_the_same(implementation):
    model = adapted(dtype=torch.float32, build_with={"moe_intermediate_size": 16})
    wanted = by_rows(model)
    model.set_experts_implementation(implementation)
    assert_close(answers(model), wanted, dtype="float32")
    with disable(model):
        base = answers(model)
    plain = make(dtype=torch.float32, moe_intermediate_size=16).eval()
    plain.set_experts_implementation(implementation)
    with torch.no_grad():
        assert_close(base, output(plain(**inputs_of("qwen3-moe"))), dtype="float32")


def test_a_row_with_broken_features_disturbs_no_other():
    model = adapted(target_modules=ONLY)
    wanted = answers(model)
    with torch.no_grad():
        for name, pair in live_pairs(model).items():
            if ".language.swa" in name:
                pair.fill_(float("nan"))
    with pytest.warns(UserWarning, match="language=swa"):
        found = answers(model)
    assert found[0].isnan().any()  # the row that uses it
    assert torch.equal(found[1:], wanted[1:])
    # Its gradients stay where they belong, too, although all rows go to the same experts.
    model.train()
    encoded = torch.from_numpy(registry().encode(COMPOSITIONS).ids)
    result = output(model(**inputs_of("qwen3-moe"), flix_features=encoded))
    result[1:].sum().backward()
    found = {f: p.grad for f, p in parameters_of(model).items()}
    assert found["language", "hau"].isfinite().all() and found["language", "hau"].any()


def test_a_weight_of_zero_selects_and_has_a_gradient():
    model = adapted(target_modules=ONLY)
    with torch.no_grad():
        for name, pair in live_pairs(model).items():
            if ".language.swa" in name and ".layers.0." in name:
                pair.fill_(float("inf"))
    ids = torch.tensor([[0, 4], [1, 4]])
    inputs = inputs_of("qwen3-moe", rows=2)
    fixed = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    learned = fixed.clone().requires_grad_()
    with torch.no_grad():
        wanted = output(model(**inputs, flix_features=ids, flix_weights=fixed))
    with pytest.warns(UserWarning, match="language=swa"):
        found = output(model(**inputs, flix_features=ids, flix_weights=learned))
    assert found.isfinite().all()
    assert_close(found, wanted)
    found.sum().backward()
    assert learned.grad[0].isfinite().all() and learned.grad[0].all()


def test_gradients_of_gradients():
    settings = {"attn_implementation": "eager"}  # others have no second derivative
    model, base = adapted(build_with=settings, target_modules=ONLY), make(**settings).eval()
    embeds = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    ids, weights = torch.tensor([[0, 4], [1, 5]]), torch.ones(2, 2, dtype=torch.float64)

    def penalty(y):
        (grad,) = torch.autograd.grad((y**2).sum(), embeds, create_graph=True)
        return (grad**2).sum()

    learned = weights.clone().requires_grad_()
    penalty(output(model(inputs_embeds=embeds, flix_features=ids, flix_weights=learned))).backward()
    wanted, pairs, factors = dense_model(base, model, ids, weights, {"inputs_embeds": embeds})
    penalty(wanted).backward()
    # The model's norms compute in float32.
    assert_close(learned.grad, factors.grad, dtype="float32")
    for name, pair in live_pairs(model).items():
        if pairs[name].grad is not None:
            assert_close(pair.grad, pairs[name].grad, dtype="float32")


def test_generation_by_cache_in_a_mixed_batch():
    model = adapted()
    inputs = inputs_of("qwen3-moe")["input_ids"]
    encoded = torch.from_numpy(registry().encode(COMPOSITIONS).ids)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(inputs, flix_features=encoded, **settings)
    for i, row in enumerate(COMPOSITIONS):
        alone = merge(model, row).generate(inputs[i : i + 1], **settings)
        assert torch.equal(found[i], alone[0])


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_plain_gradients(name, reentrant):
    found = []
    for checkpoint in (False, True):
        model = adapted(name, target_modules=ONLY).train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ids = torch.from_numpy(registry().encode(COMPOSITIONS).ids)
        project_back(output(model(**inputs_of(name), use_cache=False, flix_features=ids)))
        found.append({f: p.grad for f, p in parameters_of(model).items()})
    for feature, grad in found[0].items():
        assert (grad is None) == (found[1][feature] is None)
        if grad is not None:
            assert_close(found[1][feature], grad)


def test_autocast_computes_experts_in_their_own_dtype():
    model = adapted(dtype=torch.float32, target_modules=ONLY)
    wanted = by_rows(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(model)
        plain = output(merge(model, ROW)(**inputs_of("qwen3-moe", rows=1)))
    assert (found.float() - wanted).abs().median() < 0.05 * wanted.abs().max()
    assert (found[:1].float() - plain.float()).abs().median() < 0.05 * wanted.abs().max()


def test_feature_dropout_drops_experts_updates():
    model = adapted(target_modules=ONLY)
    encoded = registry().encode(COMPOSITIONS)
    drop = flix.FeatureDropout(p=0.5)
    ids = drop(encoded, seed=0, step=3)
    assert (ids.ids != encoded.ids).any()
    inputs = inputs_of("qwen3-moe")
    with torch.no_grad():
        found = output(model(**inputs, flix_features=torch.from_numpy(ids.ids)))
        gone = output(model(**inputs, flix_features=torch.full((4, 2), -1)))
        with disable(model):
            assert torch.equal(gone, output(model(**inputs)))
    assert_far(found, answers(model))


def test_one_expert_a_token():
    """As many entries as tokens: nothing may take the output for tokens gathered from rows."""
    model = adapted(build_with={"num_experts_per_tok": 1})
    assert_close(answers(model), by_rows(model))
    assert_close(answers(model), by_rows(model))


def test_one_kernel_may_be_adapted_alone():
    for suffix in ("gate_up_proj", "experts.down_proj"):
        model = adapted(target_modules=[suffix])
        assert all(path.endswith(suffix) for path in kernels(model)) and len(kernels(model)) == 2
        assert_close(answers(model), by_rows(model))


def test_one_composition_for_all():
    model = adapted(strategy="single")
    rows = [ROW] * 4
    assert_close(answers(model, rows=rows), by_rows(model, rows=rows))
    with pytest.raises(ConfigError, match="single"):
        answers(adapted(target_modules=ONLY, strategy="single"))
    with routed(model, ROW), torch.no_grad():
        assert_close(output(model(**inputs_of("qwen3-moe"))), by_rows(model, rows=rows))


def test_routing_is_needed():
    model = adapted(target_modules=ONLY)
    with pytest.raises(RoutingError):
        model(**inputs_of("qwen3-moe"))
    module = next(iter(kernels(model).values())).module
    with pytest.raises(RoutingError, match=r"experts\.gate_up_proj"):
        module(torch.zeros(4, 16).double(), torch.zeros(4, 2).long(), torch.ones(4, 2).double())


class Dropping(nn.Module):
    """A block that sends to its experts the tokens that it does not leave out."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        kept = torch.arange(len(flat)) % 3 != 0
        _, weights, index = self.inner.gate(flat[kept])
        made = torch.zeros_like(flat)
        made[kept] = self.inner.experts(flat[kept], index, weights)
        return made.view_as(x)


@pytest.mark.parametrize("length", [9, 3])
def test_tokens_whose_rows_are_unknown_are_refused_by_name(length):
    base = make()
    for layer in base.model.layers:
        layer.mlp = Dropping(layer.mlp)
    model = adapt(base, config(target_modules=ONLY))
    ids = torch.from_numpy(registry().encode(COMPOSITIONS).ids)
    inputs = inputs_of("qwen3-moe", length=length)
    for _ in range(2):
        with pytest.raises(RoutingError, match=r"experts\.gate_up_proj"), torch.no_grad():
            model(**inputs, flix_features=ids)
    with torch.no_grad():  # one composition for all: no doubt whose they are
        same = output(model(**inputs, flix_features=ids[:1].expand(4, -1)))
        assert_close(same, output(merge(model, COMPOSITIONS[0])(**inputs)))


def test_experts_spread_over_devices_are_refused_by_name():
    model = adapted(target_modules=ONLY)
    next(iter(kernels(model).values())).module._is_expert_parallel = True
    with pytest.raises(ConfigError, match="expert parallelism"):
        answers(model)


def test_torch_func_is_refused_by_name():
    model = adapted(target_modules=ONLY)
    inputs, ids = inputs_of("qwen3-moe"), torch.from_numpy(registry().encode(COMPOSITIONS).ids)
    values = {n: p for n, p in model.named_parameters() if "flix_" in n}

    def loss(values):
        given = {**inputs, "flix_features": ids}
        return output(torch.func.functional_call(model, values, (), given)).sum()

    with pytest.raises(ConfigError, match=r"torch\.func"):
        torch.func.grad(loss)(values)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernels = nn.Parameter(torch.zeros(3, 4, 4))


def test_experts_of_an_unknown_class_are_named_as_left_out():
    model = nn.Sequential(nn.Linear(4, 4), Unknown())
    with pytest.warns(UserWarning, match=r"'1' \(Unknown stacks its kernels in one tensor"):
        adapt(model, config())
    with pytest.raises(TargetError, match="Unknown stacks its kernels in one tensor"):
        adapt(nn.Sequential(nn.Linear(4, 4), Unknown()), config(target_modules=["1"]))
    assert experts_of(Unknown()) == ({}, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
def test_compiled_models_give_the_same(name):
    settings = {"hidden_size": 32}
    model = adapted(name, torch.float32, settings)
    model.set_experts_implementation("grouped_mm")
    encoded = torch.from_numpy(registry().encode(COMPOSITIONS).ids)
    inputs = inputs_of(name)
    learned = [torch.rand(encoded.shape).requires_grad_() for _ in range(2)]
    learned[1].data.copy_(learned[0].data)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True)
    for ids in (encoded, encoded.flip(0)):
        wanted = output(model(**inputs, flix_features=ids, flix_weights=learned[0]))
        found = output(compiled(**inputs, flix_features=ids, flix_weights=learned[1]))
        assert_close(found, wanted, dtype="float32")
        project_back(wanted)
        project_back(found)
    assert_close(learned[1].grad, learned[0].grad, dtype="float32")
    theirs = parameters_of(twin)
    for feature, p in parameters_of(model).items():
        grad = theirs[feature].grad
        if p.grad is None:
            assert grad is None or not grad.any()
        else:
            assert_close(grad, p.grad, dtype="float32")
