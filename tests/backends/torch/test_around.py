"""Layers whose own forward is called: quantised linears, and subclasses of nn.Linear."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from flix import TargetError, load_adapter  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    disable,
    load,
    merge,
    merge_in_place,
    routed,
    save,
    share_base,
    trainable_parameters,
)
from flix.backends.torch.around import FlixAround  # noqa: E402
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.registry import config, registry  # noqa: E402
from tests.helpers.torch import ROW, parameters_of, randomize  # noqa: E402

SIZE = 64


class Doubled(nn.Linear):
    """Multiplies what its kernel gives, so that its kernel's update would be doubled, too."""

    def forward(self, x):
        return super().forward(x) * 2


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-0.5, 0.5)


class Falcons(nn.Linear):
    def forward(self, input):
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class QuantLinear(nn.Module):
    """As GPTQ's: integers and scales in buffers, and no nn.Linear."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        kernel = torch.randn(d_out, d_in)
        scales = kernel.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (kernel / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.randn(d_out))

    def forward(self, x):
        return nn.functional.linear(
            x, (self.qweight * self.scales).to(x.dtype), self.bias.to(x.dtype)
        )


def _torchao(name, **settings):
    quantization = pytest.importorskip("torchao.quantization")
    layers = nn.Sequential(nn.Linear(SIZE, 32))
    quantization.quantize_(layers, getattr(quantization, name)(**settings))
    return layers[0]


def _bitsandbytes(name, **settings):
    bnb = pytest.importorskip("bitsandbytes")
    return getattr(bnb.nn, name)(SIZE, 32, **settings).to("cpu")


LAYERS = {
    "subclass": lambda: Falcons(SIZE, 32),
    "doubled": lambda: Doubled(SIZE, 32),
    "clipped": lambda: Clipped(SIZE, 32),
    "gptq": lambda: QuantLinear(SIZE, 32),
    "torchao-int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao-float8": lambda: _torchao("Float8WeightOnlyConfig"),
    "torchao-intx": lambda: _torchao("IntxWeightOnlyConfig"),
    "bitsandbytes-8": lambda: _bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes-4": lambda: _bitsandbytes(
        "Linear4bit", compute_dtype=torch.float32, quant_type="nf4"
    ),
}
BASES = {"backend": "bases", "argument": "kind"}
X = torch.randn(4, 3, SIZE, generator=torch.Generator().manual_seed(1))


def near(got, want, tolerance):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def plain(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), LAYERS[kind]()).requires_grad_(False)


def adapted(kind, **changes):
    model = adapt(plain(kind), config(**changes))
    randomize(model)
    return model.eval()


def delta(layer, row):
    """The row's update ``[d_out, d_in]``, from the definition."""
    total = torch.zeros(layer.d_out, layer.d_in)
    scales = dict(zip(layer.flix_config.registry.features, layer.flix_layout.scales, strict=True))
    for group, name in row.items():
        if (group, name) in layer.flix_A:
            total += scales[group, name] * layer.flix_B[group, name] @ layer.flix_A[group, name]
    return total


def wanted(model, kind, x, rows):
    """Row by row: the base's own output plus the update's."""
    base, found = plain(kind), []
    for i, row in enumerate(rows):
        h = torch.tanh(base[0](x[i]) + x[i] @ delta(model[0], row).t())
        found.append(base[2](h) + h @ delta(model[2], row).t())
    return torch.stack(found)


PLAIN = [
    {"language": "hau", "task": "ner"},
    {"language": "swa", "task": "pos"},
    {"task": "pos"},
    {"language": "zul"},
]


@pytest.mark.parametrize("strategy", ["auto", "gather", "masked"])
@over(LAYERS, "mixed batch", **BASES)
def test_rows_get_the_layers_own_output_and_their_updates(kind, strategy):
    model = adapt(plain(kind), config(), strategy=strategy)
    randomize(model)
    assert (
        isinstance(model[2], FlixAround)
        and type(model[2]).__name__ == type(plain(kind)[2]).__name__
    )
    x = X[: len(PLAIN)]
    y = model(x, flix_features=registry().encode(PLAIN).ids)
    near(y, wanted(model, kind, x, PLAIN), 1e-4)
    with disable(model):
        assert torch.equal(model(x), plain(kind)(x))


@over(LAYERS, "gradients", **BASES)
def test_features_train_and_what_comes_before_gets_its_gradient(kind):
    model = adapted(kind).train()
    x = X[: len(PLAIN)].clone().requires_grad_(True)
    model(x, flix_features=registry().encode(PLAIN).ids).square().sum().backward()
    found = {f: p.grad.clone() for f, p in parameters_of(model).items() if p.grad is not None}
    parameters = trainable_parameters(model)
    again = x.detach().clone().requires_grad_(True)
    dense = wanted(model, kind, again, PLAIN).square().sum()
    grads = torch.autograd.grad(dense, [again, *parameters], allow_unused=True)
    near(x.grad, grads[0], 1e-3)
    by_id = {id(p): g for p, g in zip(parameters, grads[1:], strict=True)}
    for feature, parameter in parameters_of(model).items():
        other = by_id[id(parameter)]
        assert (feature in found) == (other is not None)
        if other is not None:
            near(found[feature], other, 1e-3)


@over(LAYERS, "save and load", **BASES)
def test_adapters_are_saved_and_loaded(kind, tmp_path):
    model = adapted(kind)
    save(model, tmp_path)
    x = X[: len(PLAIN)]
    other = load(plain(kind).eval(), tmp_path)
    ids = registry().encode(PLAIN).ids
    assert torch.equal(other(x, flix_features=ids), model(x, flix_features=ids))
    shape = load_adapter(tmp_path).layers["2"]
    assert (shape.kind, shape.d_in, shape.d_out) == ("linear", SIZE, 32)


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_and_shared_bases_compute_the_same(kind):
    model, x, ids = adapted(kind), X[: len(PLAIN)], registry().encode(PLAIN).ids
    y = model(x, flix_features=ids)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x, flix_features=ids), y)
    assert torch.equal(share_base(model)(x), plain(kind).eval()(x))
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.zero_()
    assert torch.equal(copied(x, flix_features=ids), y)


def test_adapted_layers_are_pickled():
    model, x, ids = adapted("gptq"), X[: len(PLAIN)], registry().encode(PLAIN).ids
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x, flix_features=ids), model(x, flix_features=ids))


@over(["subclass"], "merge", **BASES)
def test_a_subclass_whose_kernel_is_the_map_is_merged(kind):
    model, x = adapted(kind), X[:2]
    with routed(model, ROW):
        y = model(x)
    found = merge(model, ROW)
    assert type(found[2]) is Falcons
    near(found(x), y, 1e-4)


@pytest.mark.parametrize(
    "kind,reason",
    [
        ("doubled", "its output does not change as its kernel does"),
        ("clipped", "its output does not change as its kernel does"),
        ("gptq", "its kernel is quantised"),
        ("torchao-int8", "its kernel is quantised"),
        ("torchao-float8", "its kernel is quantised"),
        ("bitsandbytes-8", "its kernel is quantised"),
        ("bitsandbytes-4", "its kernel is quantised"),
    ],
)
def test_others_are_not_merged_in_silence(kind, reason):
    with pytest.raises(
        TargetError, match=f"layer '2' .*cannot be merged: {reason}.*dequantize=True"
    ):
        merge(adapted(kind), ROW)


@over([k for k in LAYERS if k not in ("clipped", "subclass")], "dequantized", **BASES)
def test_quantised_layers_become_plain_ones_if_asked(kind):
    model, x = adapted(kind), X[:2]
    with routed(model, ROW):
        y = model(x)
    found = merge(model, ROW, dequantize=True)
    assert type(found[0]) is nn.Linear and type(found[2]) is nn.Linear
    near(found(x), y, 0.05 if kind.startswith("bits") else 1e-3)  # LLM.int8 rounds its input, too
    assert isinstance(model[2], FlixAround)


@pytest.mark.parametrize("targets,left", [(["0"], True), (["0", "1"], False)])
def test_a_model_says_that_it_is_quantised_as_long_as_it_is(targets, left):
    base = nn.Sequential(QuantLinear(4, 4), QuantLinear(4, 4))
    base.config, base.is_quantized = SimpleNamespace(quantization_config={"bits": 8}), True
    found = merge(adapt(base, config(target_modules=targets)), ROW, dequantize=True)
    assert hasattr(found.config, "quantization_config") is left is hasattr(found, "is_quantized")
    assert base.config.quantization_config and isinstance(found[1], QuantLinear) is left


def test_what_is_no_linear_map_becomes_none():
    with pytest.raises(TargetError, match=r"layer '2' \(Clipped\) is not a linear map"):
        merge(adapted("clipped"), ROW, dequantize=True)


def test_nothing_is_folded_in_place():
    with pytest.raises(
        TargetError, match=r"layer '2' \(QuantLinear\).*merge\(model, row\) gives a copy"
    ):
        merge_in_place(adapted("gptq"), ROW)


def test_a_quantisation_that_records_no_gradient_is_refused_where_features_come_before():
    model = adapt(
        nn.Sequential(nn.Linear(SIZE, SIZE), _torchao("Int8DynamicActivationInt8WeightConfig")),
        config(),
    )
    with pytest.raises(TargetError, match=r"layer '1' .* records no gradient of its input"):
        model(X[: len(PLAIN)], flix_features=registry().encode(PLAIN).ids)
    with torch.no_grad():
        model(X[: len(PLAIN)], flix_features=registry().encode(PLAIN).ids)


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.softmax(-1), y


def test_subclasses_that_give_other_things_are_left_out_by_name():
    parts = nn.ModuleDict({"router": Router(4, 4), "q": nn.Linear(4, 4)})
    with pytest.warns(
        UserWarning,
        match=r"'router' \(its class Router has a forward of its own, which does not give vectors",
    ):
        adapt(parts, config())


def test_autocast_and_compiled_models():
    model, x, ids = adapted("gptq"), X[: len(PLAIN)], registry().encode(PLAIN).ids
    y = model(x, flix_features=ids)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, flix_features=ids)
    near(low.float(), y, 0.1)
    compiled = torch.compile(model, fullgraph=True)
    near(compiled(x, flix_features=torch.from_numpy(ids)), y, 1e-4)
