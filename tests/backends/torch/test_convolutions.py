"""Convolutions as targets: each row under its own kernel, W + Σ w s B A, whatever the convolution's settings."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from flix import RoutingError, TargetError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    disable,
    merge,
    route,
    routed,
)
from flix.backends.torch.convolutions import FlixConvolution  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from flix.core.adapter.changes import fresh_pairs  # noqa: E402
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.convolutions import (  # noqa: E402
    ROW,
    SETTINGS,
    Net,
    by_row,
    drawn,
    made,
    run,
)
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import live_pairs, project_back, randomize, routing  # noqa: E402


def gradients(model):
    return {n: p.grad.clone() for n, p in live_pairs(model).items() if p.grad is not None}


@pytest.mark.parametrize("strategy", ["auto", "gather", "masked"])
@pytest.mark.parametrize("name", SETTINGS)
def test_each_row_has_its_own_kernel(name, strategy):
    model, x = made(name, strategy=strategy)
    x.requires_grad_()
    ids, weights = routing()
    weights = weights.double().requires_grad_()
    found = model.conv(x, flix_features=ids, flix_weights=weights)
    given = x.detach().clone().requires_grad_()
    expected, leaves, weight = by_row(model, given)
    assert_close(found, expected)
    assert found.is_contiguous()
    with disable(model):
        assert_far(model.conv(x), expected)
    project_back(found)
    project_back(expected)
    assert_close(x.grad, given.grad)
    assert_close(weights.grad[ids >= 0], weight.grad[ids >= 0])
    for pair, parameter in live_pairs(model).items():
        wanted = leaves[pair].grad
        if wanted is None:
            assert parameter.grad is None or not parameter.grad.any(), pair
        else:
            assert_close(parameter.grad, wanted, name=pair)


def test_a_single_composition_is_its_own_strategy():
    model, x = made(strategy="single")
    assert_close(run(model, x, [ROW] * 4), merge(model, ROW)(x))
    with pytest.raises(Exception, match=r"row 1"):
        run(model, x)


def test_a_pair_is_a_matrix_with_the_same_first_values_as_any_layer():
    model, _ = made("padded")
    assert model.conv.flix_A["task", "pos"].shape == (4, 3 * 3 * 2)
    assert model.conv.flix_B["task", "pos"].shape == (5, 4)
    fresh = adapt(Net(2, **SETTINGS["padded"][1]), config(target_modules=["conv"]))
    shape = fresh.conv.shape_of(fresh.conv)
    for feature, (a, b) in fresh_pairs(fresh.flix_config, "conv", shape).items():
        np.testing.assert_array_equal(a, fresh.conv.flix_A[feature].detach().numpy())
        assert not b.any() and np.abs(a).max() <= 18**-0.5


def test_channels_last_stays_so():
    model, x = made()
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    ids, weights = routing()
    found = model.conv(x, flix_features=ids, flix_weights=weights)
    assert found.is_contiguous(memory_format=torch.channels_last) and not found.is_contiguous()
    assert_close(found, by_row(model, x)[0])


def test_compiled_code_gives_the_same():
    model, x = made("padded")
    expected = run(model, x)
    project_back(expected)
    wanted = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = run(compiled, x)
    assert_close(found, expected)
    project_back(found)
    for pair, gradient in wanted.items():
        assert_close(live_pairs(model)[pair].grad, gradient, name=pair)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(run(compiled, x, ROWS[::-1]), run(model, x, ROWS[::-1]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same(reentrant):
    model, x = made()
    project_back(run(model, x.requires_grad_()))
    wanted = gradients(model)
    model.zero_grad()

    class Checked(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    again = Net(2, **SETTINGS["plain"][1]).double()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "flix" not in k})
    again.conv = Checked(again.conv)
    again = adapt(again, config(target_modules=["inner", "out"]))
    pairs = live_pairs(model)
    with torch.no_grad():
        for name, value in live_pairs(again).items():
            value.copy_(pairs[name.replace("conv.inner", "conv")])
    project_back(run(again, x))
    for name, gradient in gradients(again).items():
        assert_close(gradient, wanted[name.replace("conv.inner", "conv")], name=name)


def test_autocast_computes_in_its_dtype():
    model, x = made("padded")
    model, x = model.float(), x.float()
    ids, weights = routing()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.conv(x, flix_features=ids, flix_weights=weights)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), by_row(model.double(), x.double())[0], dtype="bfloat16")


@pytest.mark.parametrize("strategy", ["gather", "masked"])
def test_rows_stay_apart_whatever_values_others_have(strategy):
    model, x = made(strategy=strategy)
    rows = [{"language": "hau"}, {"task": "pos"}]
    ids, weights = routing(rows)
    x = x[:2].requires_grad_()
    expected = by_row(model, x.detach(), rows)[0][1]
    with torch.no_grad():
        model.conv.flix_A["language", "hau"].fill_(float("nan"))
    with pytest.warns(UserWarning, match="hau"):
        found = model.conv(x, flix_features=ids, flix_weights=weights)
    assert_close(found[1], expected)
    assert found[0].isnan().all()
    found[1].sum().backward()
    assert x.grad[1].isfinite().all() and not x.grad[0].nan_to_num().any()


def test_frames_in_the_first_dimension_act_by_row():
    """As video models embed their frames' patches."""

    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 2, stride=2)

        def forward(self, pixel_values):
            batch, frames = pixel_values.shape[:2]
            y = self.conv(pixel_values.reshape(batch * frames, *pixel_values.shape[2:]))
            return y.view(batch, frames, *y.shape[1:])

    torch.manual_seed(0)
    model = adapt(Video().double(), config(target_modules=["conv"])).eval()
    randomize(model, std=0.3)
    x = drawn(2, 12, 6).view(4, 3, 3, 6, 6)
    for _ in range(2):
        found = run(model, x)
        for row, features in enumerate(ROWS[:3]):
            assert_close(found[row : row + 1], merge(model, features)(x[row : row + 1]))
    # A layer that is called past its model is not seen to get frames: their number is no batch's.
    fresh = adapt(Video().double(), config(target_modules=["conv"]))
    ids, weights = routing()
    message = r"'conv' got an input of leading shape \[12, 3\]"
    with (
        route(fresh.flix_config.registry, ids, weights),
        pytest.raises(RoutingError, match=message),
    ):
        fresh.conv(x.flatten(0, 1))


def test_by_token_and_without_a_batch_only_one_composition_acts():
    model, x = made()
    ids, _ = routing([ROWS[0], ROWS[2]])
    by_token = ids[None].expand(4, 2, -1)
    with pytest.raises(RoutingError, match=r"'conv' is a convolution.*features differ by token"):
        model.conv(x, flix_features=by_token)
    with pytest.raises(RoutingError, match=r"'conv' is a convolution.*not a batch"):
        model.conv(x[0], flix_features=ids)
    with routed(model, ROW):
        assert_close(model.conv(x[0]), merge(model, ROW).conv(x)[0])


REFUSED = {
    "grouped": (nn.Conv2d(4, 4, 3, groups=2), r"groups=2"),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4), r"groups=4"),
    "transposed": (nn.ConvTranspose2d(4, 4, 3), r"it is a transposed convolution"),
    "normed": (
        nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
        r"not a plain nn\.Conv1d",
    ),
    "lazy": (nn.LazyConv2d(4, 3), r"LazyConv2d is not a plain"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_convolutions_are_refused_by_name(name):
    layer, message = REFUSED[name]
    model = nn.ModuleDict({"conv": layer, "out": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match=rf"'conv', which cannot be adapted: .*{message}"):
        adapt(copy.deepcopy(model), config(target_modules=["conv"]))


def test_convolutions_are_adapted_where_they_are_named(recwarn):
    model = Net(2, kernel_size=3)
    model.more = nn.Conv2d(4, 4, 3, groups=4)
    plain = adapt(copy.deepcopy(model), config())
    assert type(plain.conv) is nn.Conv2d and not [
        w for w in recwarn if "leaves out" in str(w.message)
    ]
    assert list(adapt(model, config(target_modules=r"conv|out")).flix_bank.layout.places) == [
        "conv",
        "out",
    ]


TARGETS = {
    "vit": r".*(patch_embeddings\.projection|q_proj|query)",  # releases name the attention's layers differently
    "convnext": ["downsampling_layer.1", "pwconv1"],
    "wav2vec2": ["conv_layers.0.conv", "conv_layers.1.conv", "q_proj"],
}


@over(TARGETS, "convolutions", backend="media")
def test_convolutions_of_transformers_models(name):
    pytest.importorskip("transformers", minversion="5")
    from tests.helpers.media import MEDIA, make
    from tests.helpers.torch import output

    model = adapt(make(name), config(target_modules=TARGETS[name])).eval()
    assert any(isinstance(layer, FlixConvolution) for _, layer in flix_layers(model))
    randomize(model, std=0.2)
    inputs = MEDIA[name].inputs(4)
    ids, weights = routing()
    found = output(model(**inputs, flix_features=ids, flix_weights=weights))
    for row, features in enumerate(ROWS[:3]):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        assert_close(found[row : row + 1], output(merge(model, features)(**one)))
