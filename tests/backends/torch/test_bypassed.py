"""Layers whose kernels a model uses without calling them are named by the first call; those not reached are none."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from flix import TargetError  # noqa: E402
from flix.backends.torch import adapt, merge, routed  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import randomize, routing  # noqa: E402

ROW = {"language": "swa", "task": "pos"}
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40, "hidden_size": 16}


def _adapted(model, **changes):
    torch.manual_seed(0)
    model = adapt(model.double(), config(**changes))
    randomize(model, std=0.3)
    return model.eval()


def _held_to_merge(model, *inputs, **changes):
    model = _adapted(model, **changes)
    ids, weights = routing([ROW] * len(inputs[0]))
    assert_close(
        model(*inputs, flix_features=ids, flix_weights=weights), merge(model, ROW)(*inputs)
    )
    return model


class Using(nn.Module):
    """Calls ``a``, and uses ``b`` in a way of its own."""

    def __init__(self, use, kind=nn.Linear):
        super().__init__()
        self.a, self.b, self.use = nn.Linear(6, 6), kind(6, 6), use

    def forward(self, x):
        return self.a(x) + self.use(self, x)


BYPASSES = {
    "linear": lambda m, x: F.linear(x, m.b.weight, m.b.bias),
    "slices": lambda m, x: F.linear(x, m.b.weight[:, :6]),
    "matmul": lambda m, x: x @ m.b.weight.t(),
    "cast": lambda m, x: F.linear(x, m.b.weight.to(x.dtype)),
    "einsum": lambda m, x: torch.einsum("bd,od->bo", x, m.b.weight),
    "joined": lambda m, x: F.linear(x, torch.cat([m.b.weight, m.b.weight]))[:, :6],
    "data": lambda m, x: x @ m.b.weight.data,
    "function": lambda m, x: Product.apply(x, m.b.weight),
    "keyword": lambda m, x: F.linear(input=x, weight=m.b.weight),
}


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel):
        return x @ kernel


@pytest.mark.parametrize("use", BYPASSES)
def test_a_kernel_that_is_used_without_its_layer_is_an_error_that_names_it(use):
    model, x = _adapted(Using(BYPASSES[use])), torch.randn(4, 6).double()
    ids, _ = routing()
    for _ in range(2):  # until it is mended
        with pytest.raises(TargetError, match=r"^b: adapted, but .*exclude_modules=\['b'\]"):
            model(x, flix_features=ids)
    with routed(model, ROW), pytest.raises(TargetError, match=r"^b: adapted"):
        model(x)


@pytest.mark.parametrize("use", BYPASSES)
def test_left_out_it_may_be_used_so(use):
    _held_to_merge(Using(BYPASSES[use]), torch.randn(4, 6).double(), exclude_modules=["b"])


HARMLESS = {
    "not reached": lambda m, x: 0,
    "its dtype": lambda m, x: x.to(m.b.weight.dtype),
    "its device": lambda m, x: x.to(m.b.weight.device) * m.b.weight.shape[0],
    "its form": lambda m, x: torch.zeros_like(m.b.weight)[0] + m.b.weight.new_zeros(6),
    "as a type": lambda m, x: x.to(m.b.weight).type_as(m.b.weight),
    "its size": lambda m, x: m.b.weight.numel() + m.b.weight.size(0) + m.b.weight.dim(),
    "called, too": lambda m, x: m.b(x) + F.linear(x, m.b.weight),
}


@pytest.mark.parametrize("use", HARMLESS)
def test_layers_that_are_not_reached_or_only_looked_at_are_no_error(use):
    model, x = _adapted(Using(HARMLESS[use])), torch.randn(4, 6).double()
    model(x, flix_features=routing()[0])


def test_the_two_modes_and_other_keywords_are_watched_each():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, more=None):
            if not self.training and more is not None:
                return self.a(x) + F.linear(more, self.b.weight)
            return self.a(x) + self.b(x)

    model, x = _adapted(Late()), torch.randn(4, 6).double()
    ids, _ = routing()
    model(x, flix_features=ids)
    model.train()(x, more=x, flix_features=ids)
    with pytest.raises(TargetError, match=r"^b: adapted"):
        model.eval()(x, more=x, flix_features=ids)


def test_a_form_is_watched_once(monkeypatch):
    from flix.backends.torch import bypassed

    made = []
    watch = bypassed.Watch
    monkeypatch.setattr(bypassed, "Watch", lambda *args: made.append(1) or watch(*args))
    model, x = _adapted(Using(HARMLESS["called, too"])), torch.randn(4, 6).double()
    ids, _ = routing()
    for _ in range(3):
        model(x, flix_features=ids)
    assert len(made) == 1
    for twin in (copy.deepcopy(model.train()), pickle.loads(pickle.dumps(_adapted(nn.Sequential(nn.Linear(6, 6)))))):  # fmt: skip
        twin(x, flix_features=ids)
    assert len(made) == 3


def test_a_head_that_is_tied_to_an_embedding_may_use_its_kernel():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.proj, self.out = (
                nn.Embedding(9, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 9, bias=False),
            )
            self.out.weight = self.emb.weight

        def forward(self, x):
            return self.out(self.proj(x)) + F.linear(x, self.emb.weight)

    model = _adapted(Tied(), target_modules=["emb", "proj"])
    model(torch.randn(4, 6).double(), flix_features=routing()[0])


def test_an_embedding_that_is_looked_up_past_its_forward():
    class Looked(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.proj = nn.Embedding(9, 6), nn.Linear(6, 6)

        def forward(self, ids):
            return self.proj(F.embedding(ids, self.emb.weight))

    model = _adapted(Looked(), target_modules=["emb", "proj"])
    with pytest.raises(TargetError, match=r"^emb: adapted"):
        model(torch.zeros(4, 3, dtype=torch.int64), flix_features=routing()[0])


# Models of transformers that read weights


def _bloom():
    from transformers import BloomConfig, BloomForCausalLM

    settings = {"n_layer": 1, "n_head": 2, "vocab_size": 40, "hidden_size": 16}
    model = BloomForCausalLM(BloomConfig(pretraining_tp=2, slow_but_exact=True, **settings))
    return model, {"input_ids": torch.arange(32).view(4, 8)}, "dense"


def _wavlm():
    from transformers import WavLMConfig, WavLMForCTC

    settings = WavLMConfig(
        intermediate_size=24, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, apply_spec_augment=False, **SIZES,
    )  # fmt: skip
    return WavLMForCTC(settings), {"input_values": torch.randn(4, 800).double()}, "_proj"


def _mamba():
    from transformers import MambaConfig, MambaForCausalLM

    settings = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**settings)), {"input_ids": torch.arange(32).view(4, 8)}, "dt_proj"  # fmt: skip


def _calls_its_layers():
    """Whether this transformers' Mamba calls ``dt_proj``; later releases read its kernel."""
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return "self.dt_proj(" in inspect.getsource(MambaMixer)


@pytest.mark.parametrize("make", [_bloom, _wavlm, _mamba])
@pytest.mark.parametrize("training", [False, True])
def test_models_that_read_weights_are_right_without_those_layers(make, training):
    torch.manual_seed(0)
    base, inputs, named = make()
    twin = copy.deepcopy(base)
    ids, weights = routing([ROW] * 4)
    adapted = _adapted(base).train(training)
    if named == "dt_proj" and _calls_its_layers():
        adapted(**inputs, flix_features=ids)
        left = []
    else:
        with pytest.raises(
            TargetError, match=rf"{named}: adapted, but|{named}, .*: adapted, but"
        ) as told:
            adapted(**inputs, flix_features=ids)
        left = eval(str(told.value).rsplit("exclude_modules=", 1)[1])  # the message's way out
    model = _adapted(twin, exclude_modules=left)
    found = model.eval()(**inputs, flix_features=ids, flix_weights=weights).logits
    assert_close(found, merge(model, ROW)(**inputs).logits)
